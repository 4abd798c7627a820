"""What a device can say of itself: when it is done, and how much memory it holds.

At its top this module imports the standard library only, so that a variant's process holds that variant's
libraries and nothing else.
"""

from parity.bench.process import peak_memory


class OnTheCpu:
    """Nothing to wait for; its memory is the process's."""

    def synchronize(self) -> None:
        """Nothing is left to do when a call returns."""

    def settle(self) -> None:
        """Memory cannot be given back so that its peak would fall."""

    def memory(self) -> dict:
        """``peak_bytes`` of this process; there is no ``whole_bytes``."""
        return {"peak_bytes": peak_memory(), "whole_bytes": None}


class CuPysGpu:
    """The current GPU as CuPy sees it."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""
        import cupy

        cupy.cuda.Device().synchronize()

    def settle(self) -> None:
        """Give back what loading the model left free, so that the peak is the work's."""
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()

    def memory(self) -> dict:
        """``peak_bytes``: what the pool holds, and it gives nothing back; ``whole_bytes``: the whole GPU's.

        The latter counts what no pool knows of: the context, the kernels, cuBLAS's workspace, and
        whatever other processes have. How much of the pool was in use at most, CuPy does not record.
        """
        import cupy

        free, total = cupy.cuda.runtime.memGetInfo()
        pool = cupy.get_default_memory_pool()
        return {"peak_bytes": pool.total_bytes(), "whole_bytes": total - free}


class TorchsGpu:
    """The current GPU as PyTorch sees it."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""
        import torch

        torch.cuda.synchronize()

    def settle(self) -> None:
        """Give back what loading the model left free, and let the peak begin here."""
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict:
        """``peak_bytes`` and ``whole_bytes`` as ``CuPysGpu.memory``: the most that its allocator held."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "whole_bytes": total - free}


def device_of(variant: str, device: str) -> OnTheCpu | CuPysGpu | TorchsGpu:
    """The device, to be waited for and asked."""
    if device == "cpu":
        return OnTheCpu()
    return CuPysGpu() if variant == "tinyllm" else TorchsGpu()
