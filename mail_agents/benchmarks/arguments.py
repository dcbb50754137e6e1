"""Arguments of ``scripts/benchmark.py``; imports no torch, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Sizes = tuple[tuple[int, int, int], ...]
StateSizes = tuple[tuple[int, int, int, int], ...]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all subjects share."""

    threads: int = 1
    """Threads of torch. With one thread CPU time is measured, with more wall time."""
    rounds: int = 5
    """Rounds in which the candidates take turns; the minimum counts unless the table says so."""
    seed: int = 0
    """Seed of weights and inputs."""
    output: Folder = None
    """Folder for markdown, JSON and PNG files, or nothing."""
    bars: bool = False
    """Exit with status 1 when a bar is missed or could not be measured."""


@dataclass(frozen=True, kw_only=True)
class OnDevice(Common):
    """Subjects that also run on a GPU."""

    device: str = "cpu"
    """'cpu' or 'cuda'."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and weights; bfloat16 is meant for a GPU."""


@dataclass(frozen=True, kw_only=True)
class Ops(OnDevice):
    """Selective scan, causal convolution and state space duality: forward and backward."""

    scan: Sizes = ((32, 10, 256), (64, 6, 256), (64, 10, 512), (256, 10, 512), (64, 60, 512))
    """Selective scans, (batch, steps, channels) each; 16 states per channel."""
    conv: Sizes = ((64, 6, 512), (64, 10, 512), (64, 60, 512))
    """Causal convolutions, (batch, steps, channels) each; 4 taps."""
    ssd: StateSizes = ((64, 10, 512, 64), (64, 60, 512, 128))
    """State space duality, (batch, steps, channels, states) each; heads of 64 channels."""
    accuracy: Sizes = ((8, 60, 64), (4, 1024, 32))
    """Selective scans whose rounding errors are measured."""
    memory: Sizes = ((64, 60, 512),)
    """Selective scans whose peak memory is measured."""
    full: bool = False
    """Also larger sizes, and slow alternatives at every size: half an hour instead of minutes."""


@dataclass(frozen=True, kw_only=True)
class Block(OnDevice):
    """Whole Mamba and Mamba-2 blocks: forward and backward."""

    mamba: Sizes = ((64, 10, 256), (256, 6, 128), (64, 60, 256))
    """Mamba blocks, (batch, steps, width) each."""
    mamba2: StateSizes = ((64, 10, 256, 64), (64, 60, 256, 128))
    """Mamba-2 blocks, (batch, steps, width, states) each; heads of 64 channels."""
    full: bool = False
    """Also larger sizes."""


@dataclass(frozen=True, kw_only=True)
class Train(OnDevice):
    """One training step (forward, backward, Adam) of MaIL's sequence model."""

    agent: str = "mail/ed-ma-ddpm"
    """Preset whose sizes are used (blocks, width, state, convolution)."""
    twin: str = "mail/ed-tr-ddpm"
    """Transformer preset that is timed beside it."""
    batch_size: int = 256
    """Windows per step; the paper's value."""
    history: int = 5
    """Observed steps."""
    horizon: int = 5
    """Predicted actions."""


@dataclass(frozen=True, kw_only=True)
class Plan(OnDevice):
    """A whole diffusion plan of MaIL: 16 denoising steps from observations to actions."""

    agent: str = "mail/ed-ma-ddpm"
    """Preset."""
    twin: str = "mail/ed-tr-ddpm"
    """Transformer preset that is timed beside it, with about as many parameters."""
    twin_layers: int = 5
    """Decoder blocks of the twin: 5 give it the parameters of ED-Ma, its preset has 6."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Plans at a time."""
    history: int = 5
    """Observed steps."""
    horizon: int = 5
    """Predicted actions."""


@dataclass(frozen=True, kw_only=True)
class Stream(OnDevice):
    """One step of a stack of Mamba blocks, token by token, with cold weights."""

    rounds: int = 101
    """Rounds in which every candidate makes one step; the median counts."""
    width: int = 256
    """Width of the stack."""
    layers: int = 8
    """Mamba blocks; the transformer has half as many, for the same number of parameters."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Sequences at a time."""
    caches: tuple[int, ...] = (60, 150, 1024)
    """Tokens that the transformer has cached."""
    contexts: tuple[int, ...] = (100, 400, 1600, 6400, 25_600)
    """Tokens seen before the step whose time is compared, at batch size 1."""


@dataclass(frozen=True, kw_only=True)
class Loader(Common):
    """Does training wait for data? The share of a training step spent waiting for a batch.

    Writes episodes with two cameras to a store in a temporary folder, and trains MaIL's ED-Ma with
    diffusion on it: batches of the paper's 256 windows. Every batch is read whole, but on a CPU a
    step on 256 windows takes minutes, so the network trains on the first --rows of them only. That
    makes steps shorter and thus waiting look larger: the share it prints is an upper bound of that
    of whole batches, which it estimates beside it. Each step is timed with batches gathered when
    they are needed and with batches read ahead by a thread. The store is dropped from the page
    cache before each measurement, as far as the system does so on request.
    """

    agent: str = "mail/ed-ma-ddpm"
    """What is trained."""
    histories: tuple[int, ...] = (1, 5)
    """Frames of each camera in a window, one measurement each."""
    batch_size: int = 256
    """Windows per batch; the paper's value."""
    rows: int = 16
    """Windows of each batch that the network trains on."""
    rounds: int = 5
    """Timed steps, after one that is not."""
    episodes: int = 20
    """Demonstrations in the store."""
    length: int = 150
    """Steps of each."""
    image_size: int = 128
    """Height and width of both cameras, in pixels."""
    device: str = "cpu"
    """'cpu' or 'cuda'."""
    bar: float = 0.05
    """Largest acceptable share of waiting."""


@dataclass(frozen=True, kw_only=True)
class Windows(Common):
    """How fast can random training windows be read? The store against Minari, on the same data.

    Writes random episodes with two cameras as a lossless Minari dataset (HDF5), converts that to a
    store, and reads random windows from both in one process with warm caches. Minari gives whole
    episodes, so a window costs an episode there. Each rate is the median of several rounds that
    alternate between the readers. The ratio compares one window at a time with one window at a
    time. Batches are limited by writing them to memory and are shown beside it.
    """

    episodes: int = 10
    """Number of episodes."""
    steps: int = 150
    """Steps per episode."""
    image_size: int = 128
    """Height and width of both cameras, in pixels."""
    history: int = 10
    """Frames of each camera in a window."""
    batch_size: int = 64
    """Windows that the store gathers at once."""
    seconds: float = 2.0
    """Time per reader and round."""
    bar: float = 500.0
    """Smallest acceptable ratio."""


@dataclass(frozen=True, kw_only=True)
class Dt(Common):
    """Decision Transformer training against CORL's single file, data loading included.

    Both train the model of CORL's defaults (3 layers of width 128, 20 steps of context, batch 64,
    AdamW, clipped gradients) with equal parameter counts on the same trajectories. A round is
    --updates whole updates: windows, forward, backward, clip, step. CORL's file is imported as it
    is, with stand-ins for the simulator and logging packages, which an update never calls:

        curl -O https://raw.githubusercontent.com/corl-team/CORL/main/algorithms/offline/dt.py
    """

    corl: Path
    """CORL's algorithms/offline/dt.py."""
    episodes: int = 50
    """Trajectories of 1000 steps, of random numbers in Hopper's shapes."""
    batch_size: int = 64
    """Windows per update."""
    updates: int = 10
    """Updates per round."""
    workers: int = 0
    """CORL's data loader processes; with 0 it samples in the training process, as ours does."""


@dataclass(frozen=True, kw_only=True)
class Docs:
    """Put measured tables into a page of the docs, between its markers."""

    source: Annotated[Path, tyro.conf.arg(name="from", metavar="DIR")]
    """Folder that other subcommands wrote with --output."""
    page: Path = Path("docs/benchmarks.md")
    """The page."""
