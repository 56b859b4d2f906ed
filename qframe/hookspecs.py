"""The hooks: everything a plugin can add to qframe.

A hook *registers objects*; the objects compute. qframe calls each hook once, when the plugin
is loaded, and afterwards looks the objects up by name, so the order of plugins never matters.
The contracts of the objects are the Protocols of `qframe.contracts`; qframe checks them at
registration and refuses an object that does not keep them, naming plugin, hook, what it
expected and what it got.

Implement as many hooks as you like in one module::

    from qframe import hookimpl

    @hookimpl
    def qframe_rounders():
        return [MyRounder()]
"""

from collections.abc import Iterable

import pluggy

from qframe.contracts import (
    Exporter,
    Kernel,
    KVCacheQuantizer,
    Layout,
    NumberFormat,
    Observer,
    OutlierHandler,
    Reader,
    Rounder,
)

PROJECT = "qframe"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qframe_observers() -> Iterable[Observer]:
    """Return observers: which statistic of a layer's inputs is collected during calibration."""


@hookspec
def qframe_outlier_handlers() -> Iterable[OutlierHandler]:
    """Return outlier handlers: how a layer is rewritten so that outliers do no harm.

    A rewrite keeps the layer's function exactly, in real numbers.
    """


@hookspec
def qframe_rounders() -> Iterable[Rounder]:
    """Return rounders: which code each weight gets. `-m NAME` on the command line selects one."""


@hookspec
def qframe_kernels() -> Iterable[Kernel]:
    """Return kernels: who computes an operation, on which device, and why not."""


@hookspec
def qframe_number_formats() -> Iterable[NumberFormat]:
    """Return number formats: which values exist, and what half a step is."""


@hookspec
def qframe_kv_caches() -> Iterable[KVCacheQuantizer]:
    """Return KV-cache quantizers: how keys and values are stored while generating."""


@hookspec
def qframe_layouts() -> Iterable[Layout]:
    """Return layouts: how a quantized folder stores its layers, so that other software reads it."""


@hookspec
def qframe_exporters() -> Iterable[Exporter]:
    """Return exporters: other kinds of files that a quantized network can be written as."""


@hookspec
def qframe_readers() -> Iterable[Reader]:
    """Return readers: checkpoints of other tools that are audited, and that no layout holds."""
