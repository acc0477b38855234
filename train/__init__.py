"""The trainer: `python train/run.py` or the command `rcl-train`. It needs the extra [train]."""

from importlib.util import find_spec

_NEEDED = ("torchvision", "timm", "sklearn", "tyro", "rich", "tensorboard", "plotly", "jinja2")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ImportError(f"the trainer needs {', '.join(_MISSING)}: pip install '.[train]' in rcl_fast's folder")
