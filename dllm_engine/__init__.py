"""dllm-engine: fast decoding for masked diffusion language models (LLaDA and its family, Dream)."""

from dllm_engine import policies
from dllm_engine._version import __version__
from dllm_engine.config import LLaDAConfig
from dllm_engine.decode import DecodeOutput, decode
from dllm_engine.engine import Engine
from dllm_engine.filter import LearnedFilter
from dllm_engine.generate import generate
from dllm_engine.model import LLaDA
from dllm_engine.outputs import Generated

__all__ = [
    "DecodeOutput",
    "Engine",
    "Generated",
    "LLaDA",
    "LLaDAConfig",
    "LearnedFilter",
    "__version__",
    "decode",
    "generate",
    "policies",
]
