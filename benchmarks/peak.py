"""How fast this machine multiplies matrices at best: what encoding is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .common import DTYPES, arguments, say, write_result


# Rows x inner x columns: the linear layers of a small encoder, and larger ones that suit every library.
SHAPES = (
    (512, 384, 1536),
    (2048, 384, 384),
    (2048, 384, 1536),
    (2048, 1536, 384),
    (4096, 384, 1536),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
)


def matmul_peak(dtype: str, seconds: float = 0.25) -> tuple[float, str]:
    """The most GFLOP/s of any shape and kernel that torch offers, each at its best of many short bursts.

    Args:
        dtype: `"float32"` or `"bfloat16"`.
        seconds: How long to try each.

    Returns:
        GFLOP/s, and what reached it.
    """
    import torch

    best, where = 0.0, ""
    with torch.inference_mode():
        for rows, inner, columns in SHAPES:
            left = torch.randn(rows, inner).to(getattr(torch, dtype))
            right = torch.randn(columns, inner).to(getattr(torch, dtype))
            for name, multiply in _kernels(left, right).items():
                rate = 2e-9 * rows * inner * columns / _best_seconds(multiply, seconds)
                if rate > best:
                    best, where = rate, f"{name}, {rows} × {inner} × {columns}"
    return best, where


def _kernels(left: Any, right: Any) -> dict[str, Callable[[], Any]]:
    import torch

    kernels = {"linear": lambda: torch.nn.functional.linear(left, right)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(right, left.shape[0])
        operation = torch.ops.mkldnn._linear_pointwise
        operation(left, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return kernels
    kernels["packed linear"] = lambda: operation(left, packed, None, "none", [], "")
    return kernels


def _best_seconds(function: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call in the best of many bursts of ten."""
    function()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            function()
        shortest = min(shortest, (time.perf_counter() - start) / 10)
    return shortest


def main() -> None:
    args = arguments(__doc__, seconds=(0.25, "seconds for every shape and kernel"))
    result = {}
    for dtype in DTYPES:
        rate, where = matmul_peak(dtype, args.seconds)
        result[dtype] = {"gflops": rate, "kernel": where}
        say(f"{dtype}: {rate:.0f} GFLOP/s ({where})")
    write_result(args.json, result)


if __name__ == "__main__":
    main()
