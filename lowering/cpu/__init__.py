"""Generated C++ for x86-64 CPUs: KernelSpec -> source -> compiled library -> call."""

from mpass.lowering.cpu.attention import sparse_attention
from mpass.lowering.cpu.support import unsupported

__all__ = ["sparse_attention", "unsupported"]
