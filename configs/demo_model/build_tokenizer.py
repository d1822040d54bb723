"""Train the demo model's tokenizer: a byte-level BPE of 2,048 entries that never joins digits nor crosses a newline.

Each line of a text is encoded on its own, so the tokens of a document are the tokens of its lines put together: the
data pipeline composes documents from encoded parts and still gets exactly what the tokenizer gives for the whole text.

    python configs/demo_model/build_tokenizer.py --out configs/demo_model
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from elsa_serve.demo import make_facts, prose_lines, python_files

BEGIN, USER, ASSISTANT, SYSTEM, END, PAD = "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"
SPECIAL = [BEGIN, USER, ASSISTANT, SYSTEM, END, PAD]
VOCABULARY = 2048
SPLIT = r"\n|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def sample_text(seed: int = 0) -> Iterator[str]:
    """What the vocabulary is fitted to: training modules, prose, and enough facts for the syllables of their words."""
    rng = random.Random(seed)
    for path in python_files(held_out=False):
        yield path.read_text(encoding="utf-8", errors="replace")
    yield from islice(prose_lines(rng), 6000)
    for fact in make_facts(60000, rng, held_out=False):
        yield f"{fact.statement} {fact.question}"


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the model")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer()
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (arguments.out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
