"""Installs rcl_fast, with kernels/ and train/ inside it: no other name lands in site-packages."""

import re
from pathlib import Path

from setuptools import setup

# Each folder at the root that is installed, and the name users import it by.
FOLDERS = {"rcl_fast": "rcl_fast", "kernels": "rcl_fast.kernels", "train": "rcl_fast.train"}


def packages() -> dict[str, str]:
    """Every package below FOLDERS, as {import name: folder}."""
    found = {}
    for folder, name in FOLDERS.items():
        for init in sorted(Path(folder).rglob("__init__.py")):
            below = init.parent.relative_to(folder).parts
            found[".".join((name, *below))] = str(init.parent)
    return found


README = Path("README.md").read_text(encoding="utf-8")


def repository() -> str | None:
    """The public address. It stands in one place, the README's `git clone`; None while a placeholder stands there."""
    address = re.findall(r"^git clone (\S+)", README, flags=re.MULTILINE)[0]
    return address.removesuffix(".git") if address.startswith("https://") else None


def description_for_an_index() -> str:
    """The README, its links to files made absolute, or plain text without an address: an index has no files."""
    link = r"\[([^]]+)\]\((?!https?://)([^)]+)\)"
    return re.sub(link, rf"[\1]({repository()}/blob/main/\2)" if repository() else r"\1", README)


def addresses() -> dict[str, str]:
    address = repository()
    if address is None:
        return {"Paper": "https://arxiv.org/abs/2312.01753"}
    return {
        "Source": address,
        "Issues": f"{address}/issues",
        "Changes": f"{address}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2312.01753",
    }


setup(
    name="rcl-fast",
    version="0.1.0",  # here alone: rcl_fast.__version__ reads what is installed
    description="Supervised contrastive losses for long-tailed classification, and the trainer that uses them",
    long_description=description_for_an_index(),
    long_description_content_type="text/markdown",
    author="The rcl_fast authors",
    project_urls=addresses(),
    keywords=["long-tailed", "class-imbalance", "contrastive-learning", "supervised-contrastive-loss", "pytorch"],
    license_expression="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "rcl_fast": ["py.typed"],
        "rcl_fast.train": ["recipes/*.toml", "report/page.html.jinja"],
    },
    install_requires=[
        "torch>=2.7",  # the loss itself; make test-floor holds it to this floor
        "numpy>=1.26",  # class counts and golden cases
        # Triton comes with torch where it exists (Linux, CUDA): no line of its own.
    ],
    extras_require={
        "train": [
            "torchvision>=0.22",  # images: decoding, transforms v2, CIFAR's files
            "timm>=1.0.9",  # any backbone by name, RandAugment with a spread of magnitudes
            "scikit-learn>=1.4",  # the digits, t-SNE, cluster indices
            "tyro>=0.9",  # the command line, from the configuration's dataclasses
            "tomli>=2.0; python_version < '3.11'",  # recipes; tomllib from 3.11 on
            "rich>=13.7",  # progress bars and tables
            "tensorboard>=2.16",  # scalars
            "plotly>=5.20",  # the report's figures, which open offline
            "jinja2>=3.1",  # the report's page
        ],
        "dali": ["nvidia-dali-cuda120>=2.0; sys_platform == 'linux'"],  # decodes and augments files on a GPU
        "sweep": [
            "optuna>=4.0",  # train/sweep.py --sampler tpe
        ],
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.7",  # two tests at a time; as many as there are cores on a GPU machine
            "hypothesis>=6.100",  # generated shapes and class distributions
            "pytest-benchmark>=4.0",
            "matplotlib>=3.8",  # bench/loss/plot.py draws the figures of the results, train/reproduce.py figure 3
            "kornia>=0.7",  # bench/images/loaders.py measures it beside the device loader
            "ruff>=0.6",
            "mypy>=1.11",
        ],
    },
    entry_points={
        "console_scripts": [
            "rcl-train = rcl_fast.train.run:main",
            "rcl-verify = rcl_fast.train.verify:main",
            "rcl-second-stage = rcl_fast.train.second_stage:main",
            "rcl-sweep = rcl_fast.train.sweep:main",
            "rcl-reproduce = rcl_fast.train.reproduce:main",
        ]
    },
)
