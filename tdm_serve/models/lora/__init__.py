"""LoRA adapters as the world publishes them: one noun in memory, a reader per file format, one writer.

Read are diffusers' safetensors files, PEFT folders and files, kohya keys, and the unnamed parameter list of the
published TDM-R1 and SD3.5 TDM files. Written is what stock diffusers' `load_lora_weights` takes.
"""

from tdm_serve.models.lora.base import Base, base_of, read_base
from tdm_serve.models.lora.core import Delta, Lora, check_fits, combined
from tdm_serve.models.lora.read import FORMATS, read_lora
from tdm_serve.models.lora.settings import Stated
from tdm_serve.models.lora.write import write_lora

__all__ = [
    "FORMATS",
    "Base",
    "Delta",
    "Lora",
    "Stated",
    "base_of",
    "check_fits",
    "combined",
    "read_base",
    "read_lora",
    "write_lora",
]
