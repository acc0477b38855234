"""The operator around the kernels: layouts, frozen inputs, autograd, torch.compile, torch.func, autocast."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from batches import grad_output_of, leaves, loss_and_gradients, random_batch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1] / "rcl_fast"))

from test_derivatives import Graphs, graphs_of_a_number

from rcl_fast import contrastive_loss
from rcl_fast.backends import triton as backend
from rcl_fast.kernels import passes
from rcl_fast.kernels.pack import KernelInputs
from rcl_fast.kernels.passes import BackwardOptions

WIDTHS = pytest.mark.parametrize("register_width", [64, 16], ids=["registers", "workspace"])


@WIDTHS
def test_non_contiguous_inputs_and_grad_output(
    register_width: int, tiny_tiles: Callable[..., None], device: torch.device
) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, 30, 11, 32)
    expected = loss_and_gradients(backend.losses, batch)

    def strided(rows: torch.Tensor) -> torch.Tensor:
        return rows.detach().T.contiguous().T.requires_grad_()

    every_second = torch.stack([batch.labels, batch.labels + 1], dim=1)[:, 0]
    counts = torch.stack([batch.class_counts, batch.class_counts], dim=1)[:, 1]
    other = batch._replace(
        features=strided(batch.features), prototypes=strided(batch.prototypes), labels=every_second, class_counts=counts
    )
    assert not other.features.is_contiguous()
    grad_output = torch.stack([grad_output_of(batch), torch.zeros(30, device=device)], dim=1)[:, 0]
    assert grad_output.stride() == (2,)
    for one, same in zip(expected, loss_and_gradients(backend.losses, other, grad_output), strict=True):
        assert torch.equal(one, same)


def test_expanded_grad_output(device: torch.device) -> None:
    batch = random_batch(device, 30, 11, 32)
    losses = backend.losses(batch)
    (by_sum,) = torch.autograd.grad(losses.sum(), batch.features)  # the grad_output has stride 0
    (by_ones,) = torch.autograd.grad(backend.losses(batch), batch.features, torch.ones_like(losses))
    assert torch.equal(by_sum, by_ones)


@WIDTHS
@pytest.mark.parametrize("frozen", ["features", "prototypes"])
def test_a_frozen_input_costs_no_gradient(
    frozen: str,
    register_width: int,
    tiny_tiles: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, 30, 11, 32)
    _, *both = loss_and_gradients(backend.losses, batch)
    returned = []
    backward = passes.backward
    monkeypatch.setattr(passes, "backward", lambda *given: returned.append(backward(*given)) or returned[-1])
    partly = batch._replace(**{frozen: getattr(batch, frozen).detach()})
    _, only = loss_and_gradients(backend.losses, partly)
    kept = 1 if frozen == "features" else 0
    assert torch.equal(only, both[kept])
    features, _, prototypes = returned[0]
    assert (features, prototypes)[1 - kept] is None


def test_without_gradients(device: torch.device) -> None:
    batch = random_batch(device, 30, 11, 32)
    with_gradients = backend.losses(batch)
    with torch.no_grad():
        assert torch.equal(backend.losses(batch), with_gradients)
    with torch.inference_mode():
        assert torch.equal(backend.losses(batch), with_gradients)


@pytest.mark.parametrize("labels", [[0, 0, 1, 2, 2, 2, 5], [0, 1, 2]], ids=["one without a positive", "none has one"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str, labels: list[int], device: torch.device) -> None:
    batch = random_batch(device, len(labels), 6, 16, with_prototypes=False, labels=torch.tensor(labels))
    losses = backend.losses(batch)
    has_positive = losses != 0
    expected = losses.sum() / (has_positive.sum().clamp(min=1) if reduction == "mean" else 1)
    reduced = backend.total(batch, reduction)
    torch.testing.assert_close(reduced, expected)
    for one, other in zip(*(torch.autograd.grad(total, batch.features) for total in (reduced, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="tiled"):
        backend.losses(random_batch(torch.device("cpu")))


def test_launches_go_to_the_device_of_the_inputs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """With two GPUs the current one may be the other; with one, or none, only the question can be seen."""
    asked = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: asked.append(tensor) or device_of(tensor))
    loss_and_gradients(backend.losses, random_batch(device, 30, 11, 32))
    assert [tensor.device for tensor in asked] == [device, device]  # features forward, keys backward


ONCE = "backend='triton' has first derivatives only"


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("with_prototypes", [False, True])
def test_no_second_derivative(traced: bool, with_prototypes: bool, device: torch.device) -> None:
    """Not by any input, not through grad_output, and not as one term of a sum."""
    batch = random_batch(device, 12, 5, 16, with_prototypes=with_prototypes)
    weight = torch.ones((), device=device, requires_grad=True)
    with FlopCounterMode(display=False) if traced else nullcontext():
        loss = (backend.losses(batch) * weight).sum() + batch.features.pow(3).sum()
        expected = torch.autograd.grad(loss, leaves(batch), retain_graph=True)
        gradients = torch.autograd.grad(loss, leaves(batch), create_graph=True)
        for one, same in zip(gradients, expected, strict=True):
            assert torch.equal(one, same)
        for gradient in gradients:
            for by in (*leaves(batch), weight):
                with pytest.raises(RuntimeError, match=ONCE):
                    torch.autograd.grad(gradient.sum(), by, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=ONCE):
            sum(gradient.pow(2).sum() for gradient in gradients).backward()


def test_torch_func_has_no_second_derivative(device: torch.device) -> None:
    batch = random_batch(device, 12, 5, 16)

    def loss(features: torch.Tensor) -> torch.Tensor:
        return backend.losses(batch._replace(features=features)).sum()

    def penalty(features: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(loss)(features).pow(2).sum()

    assert penalty(batch.features.detach()).isfinite()
    with pytest.raises(RuntimeError, match=ONCE):
        torch.func.grad(penalty)(batch.features.detach())


def _operator_arguments(device: torch.device, with_prototypes: bool, D: int = 16) -> KernelInputs:
    """With extra keys where there are prototypes."""
    extra_keys = 9 if with_prototypes else None
    batch = random_batch(device, 20, 7, D, with_prototypes=with_prototypes, extra_keys=extra_keys)
    root = torch.tensor(math.sqrt(math.log2(math.e) / batch.temperature), device=device)
    return backend._inputs(batch)._replace(root=root)


@pytest.mark.parametrize(("with_prototypes", "D"), [(True, 16), (False, 13)])
def test_opcheck(with_prototypes: bool, D: int, device: torch.device) -> None:
    arguments = _operator_arguments(device, with_prototypes, D)
    torch.library.opcheck(backend._forward_op, tuple(arguments))
    _, lse, *packed = passes.forward(arguments)
    options = BackwardOptions.of(arguments)
    saved = (*packed, lse, torch.ones(20, device=device), list(options[:4]), list(options[4:]))
    for wanted in ([True, with_prototypes, with_prototypes], [False, False, with_prototypes], [True, False, False]):
        torch.library.opcheck(backend._backward_op, (*saved, wanted))


def test_operator_and_eager_path_agree(device: torch.device) -> None:
    arguments = _operator_arguments(device, True)
    eager = backend._Loss.apply(*arguments)[0]
    operator = backend._forward_op(*arguments)[0]
    assert torch.equal(eager, operator)
    wanted = arguments[:3]
    for one, other in zip(
        torch.autograd.grad(eager.sum(), wanted), torch.autograd.grad(operator.sum(), wanted), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_prototypes", [True, False])
def test_torch_compile_makes_one_graph(with_prototypes: bool, device: torch.device) -> None:
    """For all batch sizes, and for all temperatures on each side of the bound."""
    batch = random_batch(device, 30, 11, 16, with_prototypes=with_prototypes)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"  # no C++ compiler is needed for the latter

    def losses(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
        return contrastive_loss(
            features,
            labels,
            class_counts=batch.class_counts,
            prototypes=batch.prototypes,
            temperature=temperature,
            class_average=True,
            rebalance=True,
            reduction="none",
            backend="triton",
        )

    at_first = graphs_of_a_number() - 1
    made = Graphs()
    compiled = made.compiled(losses, compiler)
    for N, temperature, graphs in ((30, 0.1, 1), (23, 0.1, 1), (30, 0.3, 1), (23, 0.02, 2), (30, 1e-6, 2)):
        features, labels = batch.features[:N].detach().clone().requires_grad_(), batch.labels[:N].clone()
        wanted = [features] if batch.prototypes is None else [features, batch.prototypes]
        found = []
        for each in (losses, compiled):
            loss = each(features, labels, temperature)
            found.append([loss, *torch.autograd.grad(loss, wanted, torch.linspace(-1, 2, N, device=device))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert made.count == graphs + (0 if temperature == 0.1 else at_first)


def test_torch_func_grad(device: torch.device) -> None:
    batch = random_batch(device, 20, 7, 16)
    grad_output = grad_output_of(batch)

    def total(features: torch.Tensor) -> torch.Tensor:
        return (backend.losses(batch._replace(features=features)) * grad_output).sum()

    _, expected, _ = loss_and_gradients(backend.losses, batch)
    torch.testing.assert_close(torch.func.grad(total)(batch.features.detach()), expected, rtol=0, atol=0)


def test_torch_func_vjp(device: torch.device) -> None:
    """Its backward pass runs when the transform is over, and its tensors are still wrapped."""
    batch = random_batch(device, 20, 7, 16)

    def losses(features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        return backend.losses(batch._replace(features=features, prototypes=prototypes))

    value, pull_back = torch.func.vjp(losses, batch.features.detach(), batch.prototypes.detach())
    ours = [value, *pull_back(grad_output_of(batch))]
    for one, expected in zip(ours, loss_and_gradients(backend.losses, batch), strict=True):
        assert torch.equal(one, expected)


@WIDTHS
def test_autocast_rounds_nothing(register_width: int, tiny_tiles: Callable[..., None], device: torch.device) -> None:
    """float32 features under autocast keep float32 products, in the backward pass too."""
    tiny_tiles(register_width=register_width)
    batch = random_batch(device, 20, 7, 32)
    expected = loss_and_gradients(backend.losses, batch)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = loss_and_gradients(backend.losses, batch)
    for one, other in zip(expected, under_autocast, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_capture(device: torch.device) -> None:
    batch = random_batch(device, 64, 11, 64, dtype=torch.bfloat16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    expected = loss_and_gradients(backend.losses, batch)
    graph = torch.cuda.CUDAGraph()
    grad_output = grad_output_of(batch)
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(backend.losses, batch, grad_output)
    graph.replay()
    for one, other in zip(expected, captured, strict=True):
        assert torch.equal(one, other)
