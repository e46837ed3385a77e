"""The kernels for CPUs: `native.cpp`, compiled on the machine where it runs and called by ctypes.

It is compiled once (about 3 s) with the machine's own C++ compiler (`build.py`). If that fails,
`library()` is None, `unavailable_reason()` says why, and the eager kernels are used.
`SAELAB_KERNELS=eager` asks for those.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.kernels import eager
from saelab.kernels.build import Unavailable, load_library
from saelab.runtime.variables import is_set_to

if TYPE_CHECKING:
    from saelab.kernels.code import Support
    from saelab.kernels.eager import Adaptation

#: Bytes that stay in a core's own cache together with other data. Our choice: half of 1 MiB.
CACHE_BYTES = 1 << 19
#: Share of all pairs that the first scan for a code has room for. Our choice: several times that of
#: a usual code; with 8 bytes a pair it is an eighth to a quarter of the pre-activations' memory.
ROOM_SHARE = 1 / 16

_POINTER, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "by_latent": (None, [*[_POINTER] * 2, _I64, _I64, *[_POINTER] * 3]),
    "firings": (_I64, [_POINTER, _POINTER, _I64, _I64, _POINTER]),
    "pool": (None, [*[_POINTER] * 4, _I64, _I64, _POINTER]),
    "project_out": (None, [_POINTER, _POINTER, _I64, _I64, _INT]),
    "normalise": (None, [_POINTER, _I64, _I64, ctypes.c_float, _INT]),
    "gram_product": (None, [*[_POINTER] * 3, _I64, _I64, *[_POINTER] * 2]),
    "encode": (None, [*[_POINTER] * 6, _I64, _I64, _INT, _POINTER]),
    "encode_backward": (None, [*[_POINTER] * 5, _I64, _I64, _INT, *[_POINTER] * 2]),
    "quantise": (None, [_POINTER, _POINTER, _I64, _I64, ctypes.c_float, _INT, *[_POINTER] * 4]),
    "screened": (_I64, [*[_POINTER] * 3, _I64, _I64, _I64, _INT, _POINTER, _POINTER]),
    "screened_topk": (_I64, [*[_POINTER] * 3, *[_I64] * 4, _INT, _POINTER, _POINTER]),
    "topk_of_pairs": (None, [*[_POINTER] * 3, _I64, _I64, *[_POINTER] * 2]),
    "keep_above": (_I64, [_POINTER, _POINTER, _I64, *[_POINTER] * 2, _I64, *[_POINTER] * 3]),
    "combine": (None, [*[_POINTER] * 4, _I64, _I64, _INT, _POINTER]),
    "combine_by_latent": (None, [*[_POINTER] * 5, _I64, _I64, _I64, _POINTER]),
    "decode_backward": (None, [*[_POINTER] * 7, _I64, _I64, _INT, *[_POINTER] * 2]),
}
for _suffix in ("float32", "bfloat16"):
    _SIGNATURES |= {
        f"above_{_suffix}": (
            _I64,
            [_POINTER, _POINTER, _I64, _I64, _I64, _INT, _POINTER, _POINTER],
        ),
        f"traced_{_suffix}": (
            _I64,
            [*[_POINTER] * 4, _I64, _I64, _I64, _INT, *[_POINTER] * 5],
        ),
        f"topk_{_suffix}": (None, [_POINTER, _I64, _I64, _I64, _INT, _POINTER]),
        f"kth_largest_{_suffix}": (ctypes.c_float, [_POINTER, _I64, _I64, _INT]),
    }


# ---------------------------------------------------------------- loading


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Builds and loads the library; returns it, or None and the reason why there is none."""
    if eager_requested():
        return None, "SAELAB_KERNELS=eager asks for the plain ones"
    try:
        library = load_library()
    except (Unavailable, OSError) as error:
        return None, str(error)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""


def eager_requested() -> bool:
    """Returns whether the environment asks for the eager kernels, on any device.

    Raises: SettingError when SAELAB_KERNELS has another value.
    """
    return is_set_to("SAELAB_KERNELS", "eager")


def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels, built at the first call, or None if they are unavailable."""
    return _load()[0]


def unavailable_reason() -> str:
    """Returns the reason why `library()` is None, '' if it is not."""
    return _load()[1]


# ---------------------------------------------------------------- calls

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _function(name: str, dtype: torch.dtype | None = None) -> Any:
    """Returns the compiled function of that name, for elements of that dtype if there is one."""
    kernels = library()
    assert kernels is not None
    return getattr(kernels, name if dtype is None else f"{name}_{DTYPES[dtype]}")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocates an output on the CPU, whatever torch's default dtype and device are: the compiled
    functions write that many bytes."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _all_float32(*inputs: Tensor | None) -> bool:
    """Returns whether the compiled functions can read all these inputs; None is left out."""
    return all(x is None or x.dtype == torch.float32 for x in inputs)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _scan_with_retry(
    z: Tensor, limit: int, scan: Callable[[int], tuple[list[Tensor], int]]
) -> list[Tensor] | None:
    """Scans z with room for a usual code, and again with more room if the code is denser.

    Args:
        z: [N, F].
        limit: the largest number of pairs.
        scan: room -> arrays of that length, and the number of pairs; the arrays hold all pairs if
            there is room.

    Returns: the arrays cut to the number of pairs; None beyond the limit.
    """
    room = min(limit, int(ROOM_SHARE * z.numel()) + 1)
    arrays, nnz = scan(room)
    if nnz > limit:
        return None
    if nnz > room:
        arrays, nnz = scan(nnz + nnz // 4)  # rows are not equally dense
    return [array[:nnz].clone() for array in arrays]


def above(z: Tensor, floor: Tensor | None, limit: int) -> tuple[Tensor, Tensor] | None:
    """Computes `eager.above`."""
    if z.dtype not in DTYPES or not _all_float32(floor):
        return eager.above(z, floor, limit)
    z, floor = z.contiguous(), None if floor is None else floor.contiguous()
    function = _function("above", z.dtype)
    return _select(function, z, limit, z.data_ptr(), _pointer(floor), *z.shape)


def _select(
    function: Any, z: Tensor, limit: int, *arguments: int | None
) -> tuple[Tensor, Tensor] | None:
    """Calls a function that selects pairs of z [N, F]; returns as `above`."""
    offsets = _empty(z.shape[0] + 1, dtype=torch.int64)

    def scan(room: int) -> tuple[list[Tensor], int]:
        latents = _empty(room, dtype=torch.int64)
        threads, out = torch.get_num_threads(), (offsets.data_ptr(), latents.data_ptr())
        return [latents], function(*arguments, room, threads, *out)

    arrays = _scan_with_retry(z, limit, scan)
    return None if arrays is None else (offsets, arrays[0])


def quantise(x: Tensor, columns: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Computes `eager.quantise`."""
    if not _all_float32(x, columns):
        return eager.quantise(x, columns, limit)
    x, columns = x.contiguous(), columns.contiguous()
    q, about = _empty(*x.shape, dtype=torch.int8), _empty(3, x.shape[0])
    _function("quantise")(
        x.data_ptr(),
        columns.data_ptr(),
        *x.shape,
        float(limit),
        torch.get_num_threads(),
        q.data_ptr(),
        *(part.data_ptr() for part in about),
    )
    return q, about


def screened(
    product: Tensor, of_rows: Tensor, of_latents: Tensor, limit: int
) -> tuple[Tensor, Tensor] | None:
    """Computes `eager.screened`."""
    return _screened("screened", product, of_rows, of_latents, limit)


def screened_topk(
    product: Tensor, of_rows: Tensor, of_latents: Tensor, k: int, limit: int
) -> tuple[Tensor, Tensor] | None:
    """Computes `eager.screened_topk`."""
    return _screened("screened_topk", product, of_rows, of_latents, limit, k)


def _screened(
    name: str, product: Tensor, of_rows: Tensor, of_latents: Tensor, limit: int, *options: int
) -> tuple[Tensor, Tensor] | None:
    product, of_rows, of_latents = (t.contiguous() for t in (product, of_rows, of_latents))
    pointers = (t.data_ptr() for t in (product, of_rows, of_latents))
    return _select(_function(name), product, limit, *pointers, *product.shape, *options)


def topk_of_pairs(values: Tensor, support: Support, k: int) -> tuple[Tensor, Tensor]:
    """Computes `eager.topk_of_pairs`."""
    if not _all_float32(values):
        return eager.topk_of_pairs(values, support, k)
    values = values.contiguous()
    latents, out = _empty(support.n_rows, k, dtype=torch.int64), _empty(support.n_rows, k)
    _function("topk_of_pairs")(
        values.data_ptr(),
        support.offsets.data_ptr(),
        support.latents.data_ptr(),
        support.n_rows,
        k,
        latents.data_ptr(),
        out.data_ptr(),
    )
    return latents, out


def keep_above(values: Tensor, floor: Tensor, support: Support) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `eager.keep_above`."""
    if not _all_float32(values, floor):
        return eager.keep_above(values, floor, support)
    values, floor = values.contiguous(), floor.contiguous()
    offsets = _empty(support.n_rows + 1, dtype=torch.int64)
    latents, out = _empty(support.nnz + 1, dtype=torch.int64), _empty(support.nnz + 1)
    kept = _function("keep_above")(
        values.data_ptr(),
        floor.data_ptr(),
        floor.numel(),
        support.offsets.data_ptr(),
        support.latents.data_ptr(),
        support.n_rows,
        offsets.data_ptr(),
        latents.data_ptr(),
        out.data_ptr(),
    )
    return offsets, latents[:kept], out[:kept]


def trace_above(
    z: Tensor, rule: Adaptation, starts: Tensor, drivers: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Computes `eager.trace_above` in one pass over z; the trace is held for one row at a time."""
    if z.dtype not in DTYPES or not _all_float32(*rule):
        return eager.trace_above(z, rule, starts, drivers, limit)
    z, rules = z.contiguous(), torch.stack(rule)
    starts, drivers = starts.contiguous(), drivers.contiguous()
    offsets = _empty(z.shape[0] + 1, dtype=torch.int64)
    moments = _empty(3, z.shape[1])

    def scan(room: int) -> tuple[list[Tensor], int]:
        latents = _empty(room, dtype=torch.int64)
        trace, slope = _empty(room), _empty(room)
        nnz = _function("traced", z.dtype)(
            z.data_ptr(),
            rules.data_ptr(),
            starts.data_ptr(),
            drivers.data_ptr(),
            len(drivers),
            z.shape[1],
            room,
            torch.get_num_threads(),
            moments.data_ptr(),
            offsets.data_ptr(),
            latents.data_ptr(),
            trace.data_ptr(),
            slope.data_ptr(),
        )
        return [latents, trace, slope], nnz

    arrays = _scan_with_retry(z, limit, scan)
    return None if arrays is None else (offsets, arrays[0], arrays[1], arrays[2], moments)


def topk(z: Tensor, k: int) -> Tensor:
    """Computes `eager.topk`; ties at the k-th place go to the lower index."""
    if z.dtype not in DTYPES:
        return eager.topk(z, k)
    z = z.contiguous()
    out = _empty(z.shape[0], k, dtype=torch.int64)
    _function("topk", z.dtype)(z.data_ptr(), *z.shape, k, torch.get_num_threads(), out.data_ptr())
    return out


def kth_largest(z: Tensor, rank: int) -> float:
    """Computes `eager.kth_largest` by counting bit patterns instead of sorting."""
    if z.dtype not in DTYPES:
        return eager.kth_largest(z, rank)
    z = z.contiguous()
    return _function("kth_largest", z.dtype)(z.data_ptr(), z.numel(), rank, torch.get_num_threads())


def by_latent(offsets: Tensor, latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `eager.by_latent` by counting."""
    order, rows = torch.empty_like(latents), torch.empty_like(latents)
    starts = _empty(d_sae + 1, dtype=torch.int64)
    _function("by_latent")(
        offsets.data_ptr(),
        latents.data_ptr(),
        offsets.numel() - 1,
        d_sae,
        order.data_ptr(),
        rows.data_ptr(),
        starts.data_ptr(),
    )
    return order, rows, starts


def firings(values: Tensor, support: Support) -> tuple[Tensor, int]:
    """Computes `eager.firings`."""
    if not _all_float32(values):
        return eager.firings(values, support)
    values, out = values.contiguous(), _empty(support.d_sae, dtype=torch.int64)
    active = _function("firings")(
        values.data_ptr(), support.latents.data_ptr(), support.nnz, support.d_sae, out.data_ptr()
    )
    return out, active


def encode(u: Tensor, w: Tensor, bias: Tensor | None, support: Support) -> Tensor:
    """Computes `eager.encode` latent by latent, so that w is read once and in order."""
    if not _all_float32(u, w, bias):
        return eager.encode(u, w, bias, support)
    u, w, bias = u.contiguous(), w.contiguous(), None if bias is None else bias.contiguous()
    out = _empty(support.nnz)
    _function("encode")(
        u.data_ptr(),
        w.data_ptr(),
        _pointer(bias),
        *_index(support),
        *w.shape,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def encode_backward(g: Tensor, u: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Computes `eager.encode_backward`."""
    if not _all_float32(g, u):
        return eager.encode_backward(g, u, support)
    g, u = g.contiguous(), u.contiguous()
    g_w, g_b = _empty(support.d_sae, u.shape[1]), _empty(support.d_sae)
    _function("encode_backward")(
        g.data_ptr(),
        u.data_ptr(),
        *_index(support),
        *g_w.shape,
        torch.get_num_threads(),
        g_w.data_ptr(),
        g_b.data_ptr(),
    )
    return g_w, g_b


def decode(values: Tensor, w: Tensor, support: Support) -> Tensor:
    """Computes `eager.decode`, in the order of latents if the output fits the cache and w does not.

    Both orders add the terms of a row in the same order: by rising latent.
    """
    if not _all_float32(values, w):
        return eager.decode(values, w, support)
    values, w = values.contiguous(), w.contiguous()
    out = _empty(support.n_rows, w.shape[1])
    if torch.get_num_threads() == 1 and 4 * out.numel() <= CACHE_BYTES < 4 * w.numel():
        shape = w.shape[0], *out.shape
        _function("combine_by_latent")(
            values.data_ptr(), *_index(support), w.data_ptr(), *shape, out.data_ptr()
        )
        return out
    _function("combine")(
        values.data_ptr(),
        support.offsets.data_ptr(),
        support.latents.data_ptr(),
        w.data_ptr(),
        *out.shape,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def decode_backward(
    g: Tensor, values: Tensor, w: Tensor, support: Support, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `eager.decode_backward`, both results from one read of g."""
    if not _all_float32(g, values, w, shares):
        return eager.decode_backward(g, values, w, support, shares)
    g, values, w = g.contiguous(), values.contiguous(), w.contiguous()
    shares = None if shares is None else shares.contiguous()
    g_values, g_w = torch.empty_like(values), torch.empty_like(w)
    _function("decode_backward")(
        g.data_ptr(),
        values.data_ptr(),
        w.data_ptr(),
        _pointer(shares),
        *_index(support),
        *w.shape,
        torch.get_num_threads(),
        g_values.data_ptr(),
        g_w.data_ptr(),
    )
    return g_values, g_w


def project_out(g: Tensor, w: Tensor) -> None:
    """Computes `eager.project_out`."""
    if not _in_place(g) or not _all_float32(w):
        eager.project_out(g, w)
        return
    w = w.contiguous()
    _function("project_out")(g.data_ptr(), w.data_ptr(), *g.shape, torch.get_num_threads())


def normalise(w: Tensor) -> None:
    """Computes `eager.normalise`."""
    if not _in_place(w):
        eager.normalise(w)
        return
    _function("normalise")(w.data_ptr(), *w.shape, eager.SMALLEST, torch.get_num_threads())


def _in_place(x: Tensor) -> bool:
    """Returns whether the compiled functions can work on the tensor's own memory."""
    return x.dtype == torch.float32 and x.is_contiguous()


def gram_product(z: Tensor, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `eager.gram_product` from one read of z, on one thread."""
    if not _all_float32(z, weights, v):
        return eager.gram_product(z, weights, v)
    z, weights, v = z.contiguous(), weights.contiguous(), v.contiguous()
    along, out = _empty(z.shape[0]), _empty(z.shape[1])
    _function("gram_product")(
        z.data_ptr(),
        weights.data_ptr(),
        v.data_ptr(),
        *z.shape,
        along.data_ptr(),
        out.data_ptr(),
    )
    return along, out


def pool(values: Tensor, support: Support, cuts: Tensor, sums: Tensor) -> None:
    """Computes `eager.pool`."""
    if not _all_float32(values, sums) or not sums.is_contiguous():
        eager.pool(values, support, cuts, sums)
        return
    values, cuts = values.contiguous(), cuts.contiguous()
    _function("pool")(
        values.data_ptr(),
        support.offsets.data_ptr(),
        support.latents.data_ptr(),
        cuts.data_ptr(),
        len(cuts) - 1,
        support.d_sae,
        sums.data_ptr(),
    )


def _index(support: Support) -> list[int]:
    """Returns pointers to the support sorted by latent: order, rows, offsets."""
    return [part.data_ptr() for part in support.by_latent]
