"""Synchronization with a device, and the memory in use on it.

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

from parity.bench.process import peak_memory


class CPU:
    """The CPU, whose memory is that of the process."""

    def synchronize(self) -> None:
        """Do nothing: a call is complete when it returns."""

    def settle(self) -> None:
        """Do nothing: the peak memory of a process never falls."""

    def memory(self) -> dict:
        """``peak_bytes`` of this process; ``whole_bytes`` is None."""
        return {"peak_bytes": peak_memory(), "whole_bytes": None}


class CuPyGPU:
    """The current GPU, used by CuPy."""

    def synchronize(self) -> None:
        """Wait until all work on the GPU is complete."""
        import cupy

        cupy.cuda.Device().synchronize()

    def settle(self) -> None:
        """Release the memory that loading left unused, so that it does not count towards the peak."""
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()

    def memory(self) -> dict:
        """``peak_bytes``: the size of the pool, which never shrinks. ``whole_bytes``: in use on the GPU.

        The latter includes the CUDA context, kernels, cuBLAS's workspace and other processes. CuPy does not
        record how much of its pool was in use at the peak.
        """
        import cupy

        free, total = cupy.cuda.runtime.memGetInfo()
        pool = cupy.get_default_memory_pool()
        return {"peak_bytes": pool.total_bytes(), "whole_bytes": total - free}


class TorchGPU:
    """The current GPU, used by PyTorch."""

    def synchronize(self) -> None:
        """Wait until all work on the GPU is complete."""
        import torch

        torch.cuda.synchronize()

    def settle(self) -> None:
        """Release the memory that loading left unused, and reset the peak."""
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict:
        """``peak_bytes``: the most that the allocator reserved. ``whole_bytes``: as ``CuPyGPU.memory``."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "whole_bytes": total - free}


def device_of(variant: str, device: str) -> CPU | CuPyGPU | TorchGPU:
    """The device that a variant runs on."""
    if device == "cpu":
        return CPU()
    return CuPyGPU() if variant == "tinyllm" else TorchGPU()
