"""Train the demo model from nothing on one machine: any number of GPUs with torchrun, or a tiny trial on a CPU.

    torchrun --standalone --nproc_per_node=4 configs/demo_model/train.py --seconds 560 --out OUT
    python configs/demo_model/train.py --tiny --seconds 60 --out OUT          # CPU: does the loop run?

It stops by the wall clock. Lengths from 128 to 32,768 tokens are mixed in every step; the mix favours the lengths that
the model still answers wrongly, and longer ones join as soon as the longest so far is mostly right. OUT receives the
FP16 weights under their Hugging Face names, a log, an evaluation, and a checkpoint to continue from (--resume).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

HERE = Path(__file__).parent
ADJUST_EVERY = 50  # steps between adjustments of rate and mix, and checks of the clock


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    ffn: int = 640
    theta: float = 1e8
    context: int = 32768
    epsilon: float = 1e-5


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def project_qkv(
    x: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, ...]:
    """x [T, C] float32 -> q, k, v [T, H, D] of bfloat16, rotated; cos and sin [T, 1, D / 2]."""
    heads, half = x.shape[1] // (2 * cos.shape[-1]), cos.shape[-1]
    qkv = F.linear(rms_norm(x, norm, epsilon).bfloat16(), weight.bfloat16()).view(len(x), 3, heads, 2 * half)
    rotated = []
    for part in (qkv[:, 0].float(), qkv[:, 1].float()):
        a, b = part[..., :half], part[..., half:]
        rotated.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).bfloat16())
    return rotated[0], rotated[1], qkv[:, 2]


def mix_and_feed(
    x: Tensor, attended: Tensor, output: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, epsilon: float
) -> Tensor:
    """The rest of a layer: x [T, C] float32, attended [T, C] bfloat16 -> [T, C] float32."""
    x = x + F.linear(attended, output.bfloat16()).float()
    gate, up = F.linear(rms_norm(x, norm, epsilon).bfloat16(), gate_up.bfloat16()).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down.bfloat16()).float()


def head_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, index: Tensor, target: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Weighted loss (scalar) and whether each prediction is right [K]."""
    hidden = rms_norm(x[index], norm, epsilon).bfloat16()
    logits = F.linear(hidden, embedding.bfloat16()).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    return (losses * weight).sum(), logits.detach().argmax(-1) == target


class DemoLlama(nn.Module):
    """A LLaMA over a flat run of tokens that holds many sequences; attention alone sees where they end."""

    def __init__(self, shape: Shape, compiled: bool) -> None:
        super().__init__()
        self.shape = shape
        c, f = shape.hidden, shape.ffn
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, c) * 0.02)
        self.norm = nn.Parameter(torch.ones(c))
        residual = 0.02 / math.sqrt(2 * shape.layers)
        sizes = {
            "qkv": (3 * c, c, 0.02),
            "output": (c, c, residual),
            "gate_up": (2 * f, c, 0.02),
            "down": (c, f, residual),
        }
        self.layers = nn.ModuleList()
        for _ in range(shape.layers):
            layer = nn.ParameterDict({name: torch.randn(m, n) * std for name, (m, n, std) in sizes.items()})
            layer.update({"norm1": torch.ones(c), "norm2": torch.ones(c)})
            self.layers.append(layer)
        half = c // shape.heads // 2
        angles = torch.outer(torch.arange(shape.context), shape.theta ** (-torch.arange(half).double() / half))
        self.register_buffer("cos", angles.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin().float()[:, None], persistent=False)
        wrap = torch.compile(dynamic=False) if compiled else (lambda function: function)
        self.project_qkv, self.mix_and_feed, self.head_loss = map(wrap, (project_qkv, mix_and_feed, head_loss))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        """Causal attention in each sequence; segment i of the tokens holds sequences of lengths[i]."""
        size = len(q) // len(lengths)
        parts = []
        for i, length in enumerate(lengths):
            q_i, k_i, v_i = (
                part[i * size : (i + 1) * size].unflatten(0, (-1, length)).transpose(1, 2) for part in (q, k, v)
            )
            attended = F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True)
            parts.append(attended.transpose(1, 2).reshape(size, -1))
        return torch.cat(parts)

    def forward(self, batch: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
        epsilon = self.shape.epsilon
        cos, sin = self.cos[batch["positions"]], self.sin[batch["positions"]]
        x = F.embedding(batch["tokens"], self.embedding)
        for p in self.layers:
            q, k, v = self.project_qkv(x, p["norm1"], p["qkv"], cos, sin, epsilon)
            attended = self.attend(q, k, v, lengths)
            x = self.mix_and_feed(x, attended, p["output"], p["norm2"], p["gate_up"], p["down"], epsilon)
        return self.head_loss(x, self.norm, self.embedding, batch["index"], batch["target"], batch["weight"], epsilon)

    def hf_state(self) -> dict[str, Tensor]:
        """FP16 weights under the names that LlamaForCausalLM uses."""
        state = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, p in enumerate(self.layers):
            q, k, v = p["qkv"].chunk(3)
            gate, up = p["gate_up"].chunk(2)
            named = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
            named |= {"self_attn.o_proj": p["output"]}
            named |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": p["down"]}
            named |= {"input_layernorm": p["norm1"], "post_attention_layernorm": p["norm2"]}
            state |= {f"model.layers.{i}.{name}.weight": value for name, value in named.items()}
        return {name: value.detach().half().cpu().contiguous() for name, value in state.items()}


def export(model: DemoLlama, folder: Path) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained` needs, tokenizer included."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    shape = model.shape
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(do_sample=False, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(model.hf_state(), folder / "model.safetensors", metadata={"format": "pt"})


class Mix:
    """How often each length is drawn: the worse its share of right digits, the more often; lengths open one by one."""

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self.accuracy = torch.zeros(len(data.LENGTHS))
        self.frontier, self.last = first, last  # indices of the longest length in use, and of the longest ever
        self.counts = torch.zeros(2, len(data.LENGTHS) + 1, device=device)
        self.shared = torch.zeros(len(data.LENGTHS)).share_memory_()
        self.update_weights()

    def observe(self, bucket: Tensor, right: Tensor) -> None:
        self.counts[0].index_add_(0, bucket, torch.ones_like(right, dtype=torch.float32))
        self.counts[1].index_add_(0, bucket, right.float())

    def adjust(self, progress: float) -> None:
        """Take in what was observed (in all processes) and open longer lengths; `progress` of the run in [0, 1]."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)
        seen, right = self.counts.cpu()[:, :-1]
        fresh = seen >= 50
        self.accuracy[fresh] = right[fresh] / seen[fresh]
        self.counts.zero_()
        forced = int(self.last * progress / 0.3)
        if self.accuracy[self.frontier] > 0.9:
            self.frontier += 1
        self.frontier = min(self.last, max(self.frontier, forced))
        self.update_weights()

    def update_weights(self) -> None:
        weights = (1.0 - self.accuracy).clamp(min=0.0) + 0.03
        weights[self.frontier + 1 :] = 0.0
        self.shared.copy_(weights / weights.sum())


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Warm-up by steps, a plateau, then a straight line to a fiftieth over the last half of the run."""
    return peak * min(1.0, step / 200) * max(0.02, min(1.0, 2.0 * (1.0 - progress)))


class Trainer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.arguments = arguments
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_flash_sdp(False)  # cuDNN's kernel took two thirds of its time on an H200
        if self.world > 1:
            dist.init_process_group("nccl", device_id=self.device)
        self.log_file = None
        if self.rank == 0:
            arguments.out.mkdir(parents=True, exist_ok=True)
            self.log_file = (arguments.out / "train.jsonl").open("w")
        shape = Shape(layers=3, hidden=128, heads=2, ffn=256) if arguments.tiny else Shape()
        torch.manual_seed(0)
        self.model = DemoLlama(shape, compiled=cuda).to(self.device)
        self.parameters = list(self.model.parameters())
        # One flat gradient: a single all-reduce, a single norm.
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.device)
        for p, part in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            p.grad = part.view_as(p)
        decayed = [p for p in self.parameters if p.dim() == 2 and p is not self.model.embedding]
        plain = [p for p in self.parameters if p.dim() != 2 or p is self.model.embedding]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=cuda)
        last = 2 if arguments.tiny else len(data.LENGTHS) - 1
        first = last if arguments.resume else last // 4  # a resumed model has seen all lengths
        self.mix = Mix(first, last, self.device)
        if arguments.resume:
            self.load(arguments.resume)

    def log(self, **fields: object) -> None:
        if self.log_file:
            line = {"seconds": round(time.monotonic() - self.started, 1), **fields}
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=self.log_file, flush=True)

    def batches(self) -> DataLoader:
        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        inputs = data.composer_inputs(tokenizer, keys=20_000 if self.arguments.tiny else 200_000)
        seed = 1000 * self.arguments.seed + self.rank
        stream = data.BatchStream(inputs, self.mix.shared, self.arguments.segments, seed)
        cuda = self.device.type == "cuda"
        workers = self.arguments.workers
        return DataLoader(
            stream, batch_size=None, num_workers=workers, pin_memory=cuda, prefetch_factor=3 if workers else None
        )

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        lengths = batch.pop("lengths").tolist()
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        loss, right = self.model(batch, lengths)
        self.flat.zero_()
        loss.backward()
        if self.world > 1:
            dist.all_reduce(self.flat)
            self.flat.div_(self.world)
        self.flat.mul_((1.0 / self.flat.norm()).clamp(max=1.0))
        self.optimizer.step()
        self.mix.observe(batch["bucket"], right)
        return loss.detach()

    def elapsed(self) -> float:
        """Seconds since the start by the first process's clock, the same in every process."""
        now = torch.tensor(time.monotonic() - self.started, device=self.device)
        if self.world > 1:
            dist.broadcast(now, 0)
        return now.item()

    def train(self) -> int:
        """Returns the number of steps made."""
        loader = iter(self.batches())
        self.log(event="data ready", world=self.world, parameters=sum(p.numel() for p in self.parameters))
        budget = self.arguments.seconds - self.arguments.reserve
        losses, begun, saved = [], None, 0.0
        for step, batch in enumerate(loader):
            losses.append(self.step(batch))
            if step % ADJUST_EVERY:
                continue
            elapsed = self.elapsed()  # the first step compiles; the clock of progress starts after it
            begun = elapsed if begun is None else begun
            progress = (elapsed - begun) / max(1e-9, budget - begun)
            self.mix.adjust(progress)
            rate = learning_rate(step + ADJUST_EVERY // 2, progress, self.arguments.rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if step % (4 * ADJUST_EVERY) == 0:
                accuracy = [round(a, 3) for a in self.mix.accuracy.tolist()]
                loss = torch.stack(losses).mean().item()
                longest = data.LENGTHS[self.mix.frontier]
                self.log(step=step, loss=round(loss, 4), rate=rate, open=longest, digits=accuracy)
                losses.clear()
            if elapsed - saved > 100:
                saved = elapsed
                self.save()
            if progress >= 1:
                break
        self.save()
        return step

    def save(self) -> None:
        """Parameters in FP32 and moments in BF16, in files small enough to copy anywhere."""
        if self.rank:
            return
        out = self.arguments.out
        flat = torch.cat([p.detach().flatten() for p in self.parameters]).cpu()
        for i, part in enumerate(flat.chunk(2)):
            torch.save(part.clone(), out / f"parameters-{i}.pt")
        for name in ("exp_avg", "exp_avg_sq"):
            moments = [self.optimizer.state[p][name].flatten() for p in self.parameters]
            torch.save(torch.cat(moments).bfloat16().cpu(), out / f"{name}.pt")

    def load(self, folder: Path) -> None:
        sizes = [p.numel() for p in self.parameters]
        flat = torch.cat([torch.load(folder / f"parameters-{i}.pt") for i in range(2)])
        moments = {name: torch.load(folder / f"{name}.pt").float().split(sizes) for name in ("exp_avg", "exp_avg_sq")}
        for i, (p, part) in enumerate(zip(self.parameters, flat.split(sizes))):
            p.data.copy_(part.view_as(p))
            state = {name: moments[name][i].view_as(p).to(self.device) for name in moments}
            # Bias correction is long past: any large step count will do.
            self.optimizer.state[p] = {"step": torch.tensor(10_000.0, device=self.device), **state}


def evaluate_export(trainer: Trainer, folder: Path) -> None:
    """Held-out exact match of the exported model, the work divided among the processes; writes OUT/eval.json."""
    import evaluate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).to(trainer.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for length in trainer.arguments.evaluate:
        seeds = range(trainer.rank, trainer.arguments.documents, trainer.world)
        mine = evaluate.evaluate(model, tokenizer, length, seeds, trainer.arguments.documents)
        everyone: list = [mine]
        if trainer.world > 1:
            everyone = [None] * trainer.world
            dist.all_gather_object(everyone, mine)
        rows += [row for part in everyone for row in part]
        if trainer.rank == 0:
            (trainer.arguments.out / "eval.json").write_text(json.dumps(evaluate.report(rows, model)))
            trainer.log(event="evaluated", length=length)
    if trainer.rank == 0:
        print(evaluate.table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log, checkpoint, evaluation")
    parser.add_argument("--export", type=Path, help="folder for the Hugging Face files (default: OUT/hf)")
    parser.add_argument("--seconds", type=float, default=560, help="wall clock for everything")
    parser.add_argument("--reserve", type=float, default=45, help="seconds of it kept for the final evaluation")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--segments", type=int, default=4, help="32,768-token segments a step and process")
    parser.add_argument("--workers", type=int, default=8, help="data processes for each GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to continue from")
    parser.add_argument("--tiny", action="store_true", help="small model, lengths up to 512: a trial on a CPU")
    parser.add_argument("--documents", type=int, default=200, help="held-out documents for each length")
    parser.add_argument("--evaluate", type=int, nargs="*", default=[8192, 512, 2048, 32768, 16384, 4096, 128])
    arguments = parser.parse_args()
    if arguments.tiny:
        data.SEGMENT = 4096
    trainer = Trainer(arguments)
    steps = trainer.train()
    torch.backends.cuda.enable_flash_sdp(True)  # documents differ in length, and cuDNN plans for each length anew
    folder = arguments.export or arguments.out / "hf"
    if trainer.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        export(trainer.model, folder)
        trainer.log(event="exported", steps=steps)
    if trainer.world > 1:
        dist.barrier()
    evaluate_export(trainer, folder)
    if trainer.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
