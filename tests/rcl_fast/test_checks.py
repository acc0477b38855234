"""Bad input is refused at the door, by name, with what was expected."""

from typing import Any

import pytest
import torch
from cases import draw_case
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed import GroupMember

from rcl_fast import ContrastiveLoss, contrastive_loss

F = torch.randn(8, 4)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"features": F.tolist()}, TypeError, ["features", "torch.Tensor", "list"]),
        ({"features": F.long()}, TypeError, ["features", "float16", "torch.int64"]),
        ({"features": F[0]}, ValueError, ["features", "[N, D]", "[4]"]),
        ({"features": F[:, :0]}, ValueError, ["features", "D >= 1", "[8, 0]"]),
        ({"labels": Y.float()}, TypeError, ["labels", "integer", "torch.float32", "labels.long()"]),
        ({"labels": Y > 0}, TypeError, ["labels", "torch.bool"]),
        ({"labels": Y[:7]}, ValueError, ["labels", "[8]", "[7]"]),
        ({"labels": Y[:4]}, ValueError, ["labels", "2 views", "[4, 2, 4]"]),
        ({"labels": Y[:, None]}, ValueError, ["labels", "[8, 1]"]),
        ({"features": F.reshape(4, 2, 4)}, ValueError, ["labels", "[4]", "[8]"]),
        ({"labels": Y + 1, "class_counts": [5, 3, 2]}, ValueError, ["labels", "[0, 3)", "got 3"]),
        ({"labels": Y - 1, "class_counts": [5, 3, 2]}, ValueError, ["labels", "got -1"]),
        ({"class_counts": [[5, 3, 2]]}, ValueError, ["class_counts", "[C]", "[1, 3]"]),
        ({"class_counts": [True, False, True]}, TypeError, ["class_counts", "torch.bool"]),
        ({"class_counts": ["a", "b"]}, TypeError, ["class_counts"]),
        ({"class_counts": [5, 0, 2], "rebalance": True}, ValueError, ["class_counts", "class 1 has 0", "log"]),
        ({"class_counts": [5, 3, -2], "rebalance": True}, ValueError, ["class_counts", "class 2 has -2"]),
        ({"class_counts": [5, 3, float("nan")], "rebalance": True}, ValueError, ["class_counts", "class 2 has nan"]),
        ({"rebalance": True}, ValueError, ["rebalance=True needs class_counts"]),
        ({"prototypes": torch.randn(3, 5)}, ValueError, ["prototypes", "[C, 4]", "[3, 5]"]),
        ({"prototypes": torch.randn(4)}, ValueError, ["prototypes", "[C, 4]", "[4]"]),
        ({"prototypes": torch.ones(3, 4).long()}, TypeError, ["prototypes", "torch.int64"]),
        ({"prototypes": torch.randn(3, 4), "class_counts": [1, 2]}, ValueError, ["class_counts has 2", "has 3"]),
        ({"compression": [1.0, 2.0], "class_counts": [1, 2, 3]}, ValueError, ["compression has 2"]),
        ({"compression": [1.0, -1.0, 1.0]}, ValueError, ["compression", "class 1 has -1"]),
        ({"compression": [1.0, float("inf"), 1.0]}, ValueError, ["compression", "class 1 has inf"]),
        ({"temperature": 0}, ValueError, ["temperature", "above 0", "got 0"]),
        ({"temperature": -0.1}, ValueError, ["temperature", "-0.1"]),
        ({"temperature": float("nan")}, ValueError, ["temperature", "nan"]),
        ({"temperature": float("inf")}, ValueError, ["temperature", "inf"]),
        ({"temperature": torch.tensor(0.1)}, TypeError, ["temperature", "Python number", "Tensor"]),
        ({"rebalance": "no", "class_counts": [1, 2, 3]}, TypeError, ["rebalance must be True or False", "'no'"]),
        ({"normalize": 1}, TypeError, ["normalize must be True or False", "got 1"]),
        ({"compression": [1.0, 1e39, 1.0]}, ValueError, ["compression", "finite in float32", "class 1 has 1e+39"]),
        ({"keys": F}, ValueError, ["keys need key_labels", "[8]"]),
        ({"key_labels": Y}, ValueError, ["key_labels need keys", "[Q, D]"]),
        ({"keys": F.tolist(), "key_labels": Y}, TypeError, ["keys must be a torch.Tensor [Q, D]", "list"]),
        ({"keys": F.long(), "key_labels": Y}, TypeError, ["keys must be float16", "torch.int64"]),
        ({"keys": F[:, :3], "key_labels": Y}, ValueError, ["keys must be [Q, 4]", "[8, 3]"]),
        ({"keys": F[None], "key_labels": Y}, ValueError, ["keys must be [Q, 4]", "[1, 8, 4]"]),
        ({"keys": F, "key_labels": Y.tolist()}, TypeError, ["key_labels must be a torch.Tensor of integers", "list"]),
        ({"keys": F, "key_labels": Y[:5]}, ValueError, ["key_labels must have shape [8]", "[8, 4]", "[5]"]),
        ({"keys": F, "key_labels": Y[:, None]}, ValueError, ["key_labels must have shape [8]", "[8, 1]"]),
        ({"keys": F, "key_labels": Y.float()}, TypeError, ["key_labels must have an integer", "key_labels.long()"]),
        (
            {"keys": F, "key_labels": Y + 1, "class_counts": [5, 3, 2]},
            ValueError,
            ["key_labels must lie in [0, 3)", "got 3"],
        ),
        ({"keys": F, "key_labels": Y - 1, "prototypes": F[:3]}, ValueError, ["key_labels must lie", "got -1"]),
        ({"anchors_are_keys": False}, ValueError, ["anchors_are_keys=False", "neither is given", "Q = 0"]),
        ({"anchors_are_keys": 0}, TypeError, ["anchors_are_keys must be True or False", "got 0"]),
        ({"reduction": "avg"}, ValueError, ["reduction", "'mean'", "'avg'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'tiled'", "'cuda'"]),
        ({"group": object()}, TypeError, ["group", "object", "init_process_group"]),
        ({"group": GroupMember.NON_GROUP_MEMBER}, ValueError, ["not a member of group"]),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        contrastive_loss(**{"features": F, "labels": Y, **changes})
    for part in parts:
        assert part in str(raised.value)


def test_tensors_on_another_device_are_refused() -> None:
    for name, tensor in {"labels": Y, "prototypes": torch.randn(3, 4), "class_counts": torch.ones(3)}.items():
        with pytest.raises(ValueError, match=f"{name} is on meta, features on cpu"):
            contrastive_loss(**{"features": F, "labels": Y, name: tensor.to("meta")})
    for name in ("keys", "key_labels"):
        with pytest.raises(ValueError, match=f"{name} is on meta, features on cpu"):
            contrastive_loss(F, Y, **{"keys": F, "key_labels": Y, name: (F if name == "keys" else Y).to("meta")})


@pytest.mark.skipif(
    torch.__version__ < "2.10" and not torch.cuda.is_available(),
    reason="before PyTorch 2.10 an index or a gradient of a fake CUDA tensor asks for CUDA's driver",
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_default_path_waits_for_no_gpu(backend: str, reduction: str) -> None:
    """A fake CUDA tensor has no values: whatever reads one, which would be a synchronisation, raises."""
    case = draw_case(30, 8, class_average=True, rebalance=True, compression=True, keys=11)
    with FakeTensorMode():
        on_gpu = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda", requires_grad=value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in case.items()
        }
        assert contrastive_loss(**on_gpu, backend=backend, reduction=reduction).device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            contrastive_loss(**on_gpu, validate=True)


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"anchors_are_keys": "no"}, TypeError, "anchors_are_keys must be True or False"),
        ({"class_counts": [3, 0], "rebalance": True}, ValueError, "class 1 has 0"),
        ({"rebalance": True}, ValueError, "needs class_counts"),
        ({"compression": [1.0, float("nan")]}, ValueError, "class 1 has nan"),
        ({"class_counts": [3, 2], "compression": [1.0]}, ValueError, "compression has 1"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"group": "world"}, TypeError, "group"),
    ],
)
def test_the_module_refuses_at_construction(options: dict[str, Any], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        ContrastiveLoss(**options)
