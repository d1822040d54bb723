"""A vLLM worker whose dummy weights are drawn like LLaMA's at the start of training, alike on every server.

    vllm serve MODEL --load-format dummy --worker-cls load_tests.drawn_weights.Worker

vLLM's own dummy weights are so small, the norms' too, that float16 rounds most of a layer's work to nothing: tokens
would not depend on attention, and a GPU multiplies zeros at less power than it multiplies a model.
"""

from typing import Any

from vllm.platforms import current_platform

from load_tests.vllm_reference import draw_weights

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class Worker(_Worker):
    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        draw_weights(self.model_runner.get_model())
