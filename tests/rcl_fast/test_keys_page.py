"""The code of docs/keys.md runs, and is what the page says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import MOST, Processes
from test_distributed import rank_of
from torch import Tensor, distributed, nn

from rcl_fast import ContrastiveLoss, contrastive_loss

PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
QUEUE, MOMENTUM, PROCESSES, ADAPTER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
BATCH, SIZE, D = 6, 14, 3


class Recording(ContrastiveLoss):
    """Keeps what it is called with, and its losses."""

    calls: list[dict[str, Tensor]]

    def forward(self, features: Tensor, labels: Tensor, **keys: Any) -> Tensor:
        loss = super().forward(features, labels, **keys)
        self.calls = [*getattr(self, "calls", []), {"features": features, "labels": labels, "loss": loss, **keys}]
        return loss


def after_training(code: str, *shape: int) -> dict[str, Any]:
    """The names that a loop over four batches of images leaves behind."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder = nn.Linear(5, D)
    names: dict[str, Any] = {
        "torch": torch,
        "copy": copy,
        "ContrastiveLoss": Recording,
        "class_counts": [9, 4, 2],
        "dimensions": D,
        "queue_size": SIZE,
        "momentum": 0.75,
        "encoder": encoder,
        "optimizer": torch.optim.SGD(encoder.parameters(), lr=0.1),
        "loader": [
            (torch.randn(BATCH, *shape, generator=generator), torch.randint(3, (BATCH,), generator=generator))
            for _ in range(4)
        ],
        "before": copy.deepcopy(encoder),
    }
    exec(code, names)
    return names


def test_the_queue_has_the_last_batches_the_newest_first() -> None:
    names = after_training(QUEUE, 5)
    calls = names["criterion"].calls
    assert [len(call["keys"]) for call in calls] == [0, 6, 12, 14]
    last = torch.cat([call["features"].detach() for call in reversed(calls[:3])])
    assert torch.equal(calls[3]["keys"], last[:SIZE])
    labels = torch.cat([call["labels"] for call in reversed(calls[:3])])
    assert torch.equal(calls[3]["key_labels"], labels[:SIZE])
    assert not calls[3]["keys"].requires_grad
    assert not torch.equal(names["encoder"].weight, names["before"].weight)


def test_the_momentum_encoder_follows_and_makes_the_keys() -> None:
    names = after_training(MOMENTUM, 2, 5)
    criterion, (*_, (images, labels)) = names["criterion"], names["loader"]
    assert [len(call["keys"]) for call in criterion.calls] == [6, 12, 14, 14]
    with torch.no_grad():
        assert torch.equal(criterion.calls[-1]["keys"][:BATCH], names["slow_encoder"](images[:, 1]))
    assert torch.equal(criterion.calls[-1]["key_labels"][:BATCH], labels)
    assert not criterion.anchors_are_keys
    weights = [names[name].weight for name in ("before", "slow_encoder", "encoder")]
    moved = [(weight - weights[0]).norm().item() for weight in weights]
    assert 0 < moved[1] < moved[2]


def test_numbers_of_images_as_labels_make_it_mocos_loss() -> None:
    """−log of the softmax over the keys, at the key of the same image."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (BATCH, SIZE))
    loss = contrastive_loss(
        queries, torch.arange(BATCH), keys=keys, key_labels=torch.arange(SIZE), anchors_are_keys=False
    )
    logits = nn.functional.normalize(queries) @ nn.functional.normalize(keys).T / 0.1
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.arange(BATCH)))


def gathered(group: Any) -> bool:
    names: dict[str, Any] = {"distributed": distributed}
    exec(PROCESSES, names)
    rank = rank_of(group)
    features = torch.arange(6.0).reshape(2, 3) + 10 * rank
    everyones = torch.cat([torch.arange(6.0).reshape(2, 3) + 10 * other for other in range(MOST)])
    queue = names["of_all_processes"](features)
    labels = names["of_all_processes"](torch.tensor([rank, 0]))
    loss = contrastive_loss(features, torch.tensor([rank, 0]), keys=queue, key_labels=labels, group=group)
    return torch.equal(queue, everyones) and bool(loss.isfinite())


def test_every_process_gets_the_same_queue(processes: Processes) -> None:
    assert all(processes.run(MOST, gathered))


class Memory:
    """Calls a loss as CrossBatchMemory of pytorch-metric-learning does: the batch is in the memory already."""

    def __init__(self, loss: nn.Module, width: int, size: int) -> None:
        self.loss, self.rows, self.classes = loss, torch.zeros(size, width), torch.zeros(size, dtype=torch.long)
        self.entered = 0

    def __call__(self, embeddings: Tensor, labels: Tensor, enters: Tensor | None = None) -> Tensor:
        size = len(self.rows)
        new = slice(None) if enters is None else enters
        places = (self.entered + torch.arange(len(labels[new]))) % size
        self.rows[places], self.classes[places] = embeddings[new].detach(), labels[new]
        self.entered += len(places)
        filled = min(self.entered, size)
        pairs = torch.ones(len(embeddings), filled, dtype=torch.bool)
        if enters is None:
            pairs[torch.arange(len(places)), places] = False
        else:
            embeddings, labels, pairs = embeddings[~enters], labels[~enters], pairs[~enters]
        same = labels[:, None] == self.classes[:filled]
        indices = (*torch.where(pairs & same), *torch.where(pairs & ~same))
        return self.loss(embeddings, labels, indices, self.rows[:filled], self.classes[:filled])


def adapter(**options: Any) -> Any:
    names: dict[str, Any] = {"torch": torch, "ContrastiveLoss": ContrastiveLoss}
    exec(ADAPTER, names)
    return names["SupConLoss"]([9, 4, 2], rebalance=True, **options)


def test_the_adapter_leaves_out_the_batchs_own_copies() -> None:
    """The memory of 14 is filled in the third step, and its oldest rows are overwritten from then on."""
    generator = torch.Generator().manual_seed(0)
    memory = Memory(adapter(), D, SIZE)
    queue, queue_labels = torch.zeros(0, D), torch.zeros(0, dtype=torch.long)
    for _ in range(6):
        embeddings = torch.randn(BATCH, D, generator=generator, requires_grad=True)
        labels = torch.randint(3, (BATCH,), generator=generator)
        loss = memory(embeddings, labels)
        expected = contrastive_loss(
            embeddings, labels, class_counts=[9, 4, 2], rebalance=True, keys=queue, key_labels=queue_labels
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(one, embeddings)[0] for one in (loss, expected)))
        left = BATCH - SIZE  # of the memory at the next step: its last rows
        queue, queue_labels = torch.cat([queue, embeddings.detach()])[left:], torch.cat([queue_labels, labels])[left:]


def test_the_adapter_takes_all_of_a_memory_that_other_rows_enter() -> None:
    embeddings, labels = torch.randn(8, D), torch.tensor([0, 1, 2, 0, 0, 1, 2, 1])
    enters = torch.arange(8) >= 4
    loss = Memory(adapter(), D, SIZE)(embeddings, labels, enters)
    keys = {"keys": embeddings[4:], "key_labels": labels[4:]}
    expected = contrastive_loss(embeddings[:4], labels[:4], class_counts=[9, 4, 2], rebalance=True, **keys)
    torch.testing.assert_close(loss, expected)


def test_the_adapter_refuses_chosen_pairs_and_a_batch_of_one() -> None:
    embeddings, labels = torch.randn(4, D), torch.tensor([0, 1, 0, 1])
    few = tuple(torch.tensor([index]) for index in (0, 2, 0, 1))
    all_and_one_twice = tuple(
        index.flatten() for index in (*torch.meshgrid(*[torch.arange(4)] * 2, indexing="ij"), *few[2:])
    )
    for pairs in (few, all_and_one_twice):
        with pytest.raises(ValueError, match="use no miner"):
            adapter()(embeddings, labels, pairs, embeddings, labels)
    with pytest.raises(ValueError, match="two embeddings or more"):
        Memory(adapter(), D, SIZE)(embeddings[:1], labels[:1])
