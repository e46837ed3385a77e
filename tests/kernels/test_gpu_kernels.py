"""The Triton kernels against the eager ones: on a GPU, or else in Triton's interpreter.

Whether Triton interprets is settled when it is imported, so the interpreter has a process of its
own: `test_in_the_interpreter` runs this file again.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from saelab.kernels import Support, decode_at, eager, encode_at, functions
from saelab.seeding import torch_stream

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

needs_triton = pytest.mark.skipif(
    not TRITON, reason="triton is not installed: `make test-triton` installs it"
)
can_run = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="runs on a GPU or in Triton's interpreter"
)


@dataclass(eq=False)
class Problem:
    """Tensors of each kind that the kernels take, and a support, drawn from one seed."""

    u: Tensor
    w: Tensor
    b: Tensor
    values: Tensor
    support: Support


def problem(n: int, d_sae: int, d: int, density: float, seed: int) -> Problem:
    """Row 1 and latent 0 have no pairs, if there are others; a row's latents in any order."""
    stream = torch_stream(seed, "gpu kernels")
    mask = torch.rand(n, d_sae, generator=stream) < density
    if n > 2 and d_sae > 2:
        mask[1] = mask[:, 0] = False
    latents = [row.nonzero().flatten() for row in mask]
    latents = [here[torch.randperm(len(here), generator=stream)] for here in latents]
    offsets = torch.tensor([0, *(len(row) for row in latents)]).cumsum(0)
    pairs = torch.cat([*latents, torch.empty(0, dtype=torch.int64)])
    u, w, b, values = (
        torch.randn(*shape, generator=stream).to(DEVICE)
        for shape in ((n, d), (d_sae, d), (d_sae,), (len(pairs),))
    )
    return Problem(u, w, b, values, Support(offsets.to(DEVICE), pairs.to(DEVICE), d_sae))


#: n, F, d, density: no rows, no pairs, all pairs, one column, rows of several tiles and of parts.
SHAPES = [
    (0, 5, 4, 0.5),
    (4, 5, 7, 0.0),
    (6, 9, 1, 0.4),
    (7, 20, 16, 1.0),
    (12, 30, 33, 0.15),
    (3, 11, 513, 0.6),
    (2, 150, 5, 0.1),
    (30, 3, 24, 0.8),
]


@pytest.fixture(params=SHAPES, ids=str)
def p(request: pytest.FixtureRequest, global_random_seed: int) -> Problem:
    return problem(*request.param, global_random_seed)


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype and got.device == wanted.device
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=3e-5)


@needs_triton
@can_run
class TestAgainstEager:
    def test_encode(self, p: Problem) -> None:
        from saelab.kernels import gpu

        for bias in (p.b, None):
            close(gpu.encode(p.u, p.w, bias, p.support), eager.encode(p.u, p.w, bias, p.support))

    def test_encode_backward(self, p: Problem) -> None:
        from saelab.kernels import gpu

        for got, wanted in zip(
            gpu.encode_backward(p.values, p.u, p.support),
            eager.encode_backward(p.values, p.u, p.support),
            strict=True,
        ):
            close(got, wanted)

    def test_decode(self, p: Problem) -> None:
        from saelab.kernels import gpu

        close(gpu.decode(p.values, p.w, p.support), eager.decode(p.values, p.w, p.support))

    def test_decode_backward(self, p: Problem) -> None:
        from saelab.kernels import gpu

        for got, wanted in zip(
            gpu.decode_backward(p.u, p.values, p.w, p.support),
            eager.decode_backward(p.u, p.values, p.w, p.support),
            strict=True,
        ):
            close(got, wanted)

    def test_pool(self, p: Problem) -> None:
        """Segments of several rows, of one and of none; rows before and after them are left out."""
        from saelab.kernels import gpu

        n = p.support.n_rows
        for places in ([0, n], [n // 4, n // 2, n // 2, n // 2 + (n > 1), n - n // 5]):
            cuts = torch.tensor(places, device=DEVICE)
            got = torch.ones(len(places) - 1, p.support.d_sae, device=DEVICE)
            wanted = got.clone()
            gpu.pool(p.values, p.support, cuts, got)
            eager.pool(p.values, p.support, cuts, wanted)
            close(got, wanted)

    def test_gradients(self, p: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
        from saelab.kernels import gpu

        leaves = [x.requires_grad_() for x in (p.u, p.w, p.b, p.values)]

        def gradients() -> tuple[Tensor, ...]:
            z = encode_at(p.u, p.w, p.b, p.support)
            y = decode_at(p.values + z / p.u.shape[1], p.w, p.support)
            return torch.autograd.grad(y.square().sum() / (1 + y.numel()) + z.sum(), leaves)

        monkeypatch.setattr(functions, "kernels_for", lambda device: eager)
        wanted = gradients()
        monkeypatch.setattr(functions, "kernels_for", lambda device: gpu)
        for one, other in zip(gradients(), wanted, strict=True):
            close(one, other)

    def test_strided_input(self, global_random_seed: int) -> None:
        from saelab.kernels import gpu

        p = problem(6, 9, 8, 0.5, global_random_seed)
        u, w = p.u.t().contiguous().t(), p.w.t().contiguous().t()
        values = p.values[:1].expand(p.support.nnz)
        close(gpu.encode(u, w, p.b, p.support), eager.encode(p.u, p.w, p.b, p.support))
        close(gpu.decode(values, w, p.support), eager.decode(values, p.w, p.support))
        for got, wanted in zip(
            gpu.decode_backward(u, values, w, p.support),
            eager.decode_backward(p.u, values, p.w, p.support),
            strict=True,
        ):
            close(got, wanted)

    def test_same_bits_again(self, global_random_seed: int) -> None:
        from saelab.kernels import gpu

        p = problem(20, 9, 33, 0.6, global_random_seed)
        first, again = (
            [
                gpu.encode(p.u, p.w, p.b, p.support),
                *gpu.encode_backward(p.values, p.u, p.support),
                gpu.decode(p.values, p.w, p.support),
                *gpu.decode_backward(p.u, p.values, p.w, p.support),
            ]
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_other_dtypes_go_to_eager(self, global_random_seed: int) -> None:
        from saelab.kernels import gpu

        p = problem(4, 6, 3, 0.6, global_random_seed)
        u, w, b, values = (x.double() for x in (p.u, p.w, p.b, p.values))
        sums = values.new_zeros(1, 6)
        gpu.pool(values, p.support, torch.tensor([0, 4], device=DEVICE), sums)
        results = [
            sums,
            gpu.encode(u, w, b, p.support),
            *gpu.encode_backward(values, u, p.support),
            gpu.decode(values, w, p.support),
            *gpu.decode_backward(u, values, w, p.support),
        ]
        assert {x.dtype for x in results} == {torch.float64}


def child(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTEST_", "TRITON_INTERPRET", "SAELAB_KERNELS"))
    }
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=own | environment
    )


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
class TestWithoutGPU:
    def test_in_the_interpreter(self) -> None:
        only = ["-p", "no:xdist", "-k", "TestAgainstEager"]
        done = child("-m", "pytest", __file__, *only, TRITON_INTERPRET="1")
        assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
        assert "skipped" not in done.stdout

    def test_compiles(self) -> None:
        """To machine code, without a GPU: the interpreter takes more than the compiler does."""
        done = child("-c", COMPILE)
        assert done.returncode == 0 and done.stdout == "10 compiled\n", done.stdout + done.stderr


COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from saelab.kernels import gpu

types = dict.fromkeys(["weights", "table", "out", "totals", "u", "w", "bias", "values"], "*fp32")
types |= dict.fromkeys(["order", "index", "offsets", "rows", "latents", "bounds"], "*i64")
types |= {"sums": "*fp32", "d": "i32", "nnz": "i32", "d_sae": "i32"}
tiles = {"PAIRS": gpu.PAIRS, "WIDTH": gpu.WIDEST, "LATENTS": gpu.LATENTS}
kernels = [
    (gpu._bags_kernel, []),
    (gpu._bags_kernel, ["order", "totals"]),
    (gpu._products_kernel, []),
    (gpu._products_kernel, ["bias"]),
    (gpu._pool_kernel, []),
]
made = 0
for (kernel, absent), capability in itertools.product(kernels, [80, 90]):
    names = kernel.arg_names
    fixed = {name: tiles[name] for name in names if name in tiles} | dict.fromkeys(absent)
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    source = triton.compiler.ASTSource(kernel, signature, fixed)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    assert code["cubin"] and "atom" not in code["ptx"]
    made += 1
print(made, "compiled")
"""


KERNELS = (
    "import sys, torch; from saelab import kernels; early = 'triton' in sys.modules;"
    "print(early, kernels.kernels_for(torch.device('cuda')).__name__)"
)
EAGER, GPU = "False saelab.kernels.eager\n", "False saelab.kernels.gpu\n"


class TestTable:
    def test_without_triton_or_on_request(self) -> None:
        hidden = f"import sys; sys.modules['triton'] = None; {KERNELS}"
        assert child("-c", hidden).stdout.endswith("saelab.kernels.eager\n")
        assert child("-c", KERNELS, SAELAB_KERNELS="eager", TRITON_INTERPRET="1").stdout == EAGER

    @needs_triton
    def test_with_triton(self) -> None:
        """Imported at the first use; without a GPU to drive it serves its interpreter only."""
        assert child("-c", KERNELS, TRITON_INTERPRET="1").stdout == GPU
        assert child("-c", KERNELS).stdout == (GPU if torch.cuda.is_available() else EAGER)
