"""A model as one ONNX file, and a page of JSON that says how to feed it.

The file takes pixels in [0, 1]: mean and deviation are inside, so that nobody can forget them. What must
happen to a picture before that, and which column is which class, stands in `model.json`.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina import __version__
from lamina.data.transforms import InputSpec
from lamina.errors import ConfigError, ModelFileError
from lamina.model import Batch, PromptedModel
from lamina.storage import write_whole
from lamina.training.evaluation import scores

INPUT = "images"
OUTPUTS = ("probabilities", "logits", "features")
OLDEST_OPSET = 18

#: how far ONNX Runtime's logits may be from torch's, as a share of max(1, |logit|)
TOLERANCE = 1e-4

#: bytes in the largest message that protobuf can write
LARGEST = 2**31 - 1

#: bytes set aside for all in the file that is not a weight; the graph of forty blocks takes half of it
_BESIDES = 2**20

_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


def export_onnx(
    model: PromptedModel,
    path: Path,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    temperature: float = 1.0,
    opset: int = OLDEST_OPSET,
) -> bool:
    """Write a model as one ONNX file, in float32, for batches of any number of images.

    Its input is `images`, (B, 3, size, size), float32, RGB in [0, 1]. Its outputs are `probabilities`
    (B, C), the softmax of logits / temperature, `logits` (B, C) and `features` (B, F). The model itself
    is left as it is. Where ONNX Runtime is installed, its logits are compared with torch's first; a file
    that fails is not written.

    Args:
        size: height and width that the tower takes, in pixels.
        mean, std: per channel, of pixels in [0, 1].
        temperature: divides the logits before the softmax.
        opset: version of ONNX's set of operators.

    Returns:
        Whether ONNX Runtime was there to confirm the file.

    Raises:
        ConfigError: when a number is out of range, a package is missing, the model cannot be exported, draws
            random numbers or is too large for one file.
        ModelFileError: when ONNX Runtime cannot load the file, or gets other logits than torch.
        StorageError: when the file cannot be written.
    """
    onnx = _onnx()
    pixels = InputSpec(size, _three(mean), _three(std))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be finite and above 0; got {temperature}")
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ConfigError(f"opset must be from {OLDEST_OPSET} to {newest}, the newest that onnx knows; got {opset}")
    deployed = _Deployed(_plain_copy(model), pixels, temperature)
    _check_size(deployed)
    with _quiet(), torch.no_grad():
        try:
            graph = _graph(onnx, deployed, pixels.size, opset)
        except Exception as error:  # a plug-in can raise anything, and torch nearly does
            raise ConfigError(
                f"the model cannot be exported with opset {opset}: {_reason(error)}; its prompts and head must do what "
                "torch.export can trace"
            ) from error
        if drawn := {node.op_type for node in graph.graph.node} & _RANDOM:
            raise ConfigError(
                f"the model draws random numbers when it predicts ({', '.join(sorted(drawn))}), and a file for "
                "deployment must give the same answer every time; export a method whose prompts and head draw none"
            )
        content = graph.SerializeToString()
        verified = _verified(content, deployed, pixels.size)
    write_whole(path, content)
    return verified


def describe(
    path: Path,
    *,
    file: str,
    classes: Sequence[str],
    tasks: Sequence[Sequence[str]],
    features: int,
    pixels: InputSpec,
    model: Mapping[str, Any],
    temperature: float = 1.0,
    thresholds: Mapping[str, Any] | None = None,
    verified: bool = False,
) -> None:
    """Write what someone needs to use an exported model without lamina: `model.json`.

    Args:
        path: of the JSON file.
        file: name of the ONNX file beside it.
        classes: names in the order of columns.
        tasks: names of each task's classes, in order of arrival.
        features: F.
        pixels: what the backbone expects.
        model: facts about where the model comes from, as JSON can hold them.
        temperature: as in `export_onnx`.
        thresholds: when an answer is not to be trusted, by the name of what is compared; JSON.
        verified: what `export_onnx` returned.

    Raises:
        StorageError: when the file cannot be written.
    """
    shapes = {"probabilities": len(classes), "logits": len(classes), "features": features}
    meanings = {
        "probabilities": f"softmax of logits / {temperature:g}, one column per class in the order of `classes`",
        "logits": "scores before the softmax, in the same order",
        "features": "what the classifier reads",
    }
    page = {
        "lamina": __version__,
        "file": file,
        "model": dict(model),
        "classes": list(classes),
        "tasks": [list(task) for task in tasks],
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, pixels.size, pixels.size],
            "type": "float32",
            "range": [0, 1],
            "channels": "RGB",
            "meaning": "one image per row, channels first; images do not influence one another",
        },
        "preprocessing": _steps(pixels),
        "outputs": [
            {"name": name, "shape": ["batch", shapes[name]], "type": "float32", "meaning": meanings[name]}
            for name in OUTPUTS
        ],
        "temperature": temperature,
        "thresholds": dict(thresholds or {}),
        "verified": verified,
    }
    write_whole(path, json.dumps(page, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _steps(pixels: InputSpec) -> list[dict[str, Any]]:
    """Return what must happen to a picture, in order: the `plain` transform of lamina in words and numbers."""
    size, short = pixels.size, math.floor(pixels.size / pixels.crop_pct)
    return [
        {
            "step": "decode",
            "words": "to 8-bit RGB, turned upright by its EXIF tag, transparent parts on white",
        },
        {
            "step": "resize",
            "words": f"the shorter side to {short} pixels, the longer one in proportion, rounded down; "
            f"{pixels.interpolation} with antialiasing, values rounded to bytes; not for a picture of {size} x {size}",
            "shorter_side": short,
            "interpolation": pixels.interpolation,
            "antialias": True,
            "skip_if_size": [size, size],
        },
        {
            "step": "crop",
            "words": f"the {size} x {size} pixels in the middle; from row round((height - {size}) / 2) and "
            f"column round((width - {size}) / 2), halves to the even number",
            "size": [size, size],
        },
        {"step": "scale", "words": "bytes divided by 255, so that pixels are in [0, 1]", "divide_by": 255},
        {
            "step": "normalise",
            "words": "already inside the file, do not do it again: (pixels - mean) / std, channel by channel",
            "inside_the_file": True,
            "mean": list(pixels.mean),
            "std": list(pixels.std),
        },
    ]


class _Deployed(nn.Module):
    """The function that goes into the file."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: PromptedModel, pixels: InputSpec, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.register_buffer("pixel_mean", torch.tensor(pixels.mean)[:, None, None])
        self.register_buffer("pixel_std", torch.tensor(pixels.std)[:, None, None])
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, _ = self.model.features(Batch((images - self.pixel_mean) / self.pixel_std))
        logits = scores(self.model, Batch(None, features=features)).float()
        return (logits / self.temperature).softmax(-1), logits, features.float()


def _plain_copy(model: PromptedModel) -> PromptedModel:
    """Return a copy on the CPU whose tower is in float32 and whose frozen layers hold their plain weights."""
    model = copy.deepcopy(model).cpu()
    tower: Any = model.tower.float()
    if isinstance(getattr(tower, "dtype", None), torch.dtype):
        tower.dtype = torch.float32
    return model


def _graph(onnx: Any, deployed: _Deployed, size: int, opset: int) -> Any:
    """Trace a model and translate it; return a checked `onnx.ModelProto`."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Not one image: torch would take a batch of one for a constant.
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    deployed(images)  # a model that does not run says why in plainer words than one that cannot be traced
    program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    _use_ordinary_operators(program)
    translated = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=OUTPUTS,
        dynamic_shapes=({0: "batch"},),
        opset_version=opset,
    )
    assert translated is not None
    # Notes for those who debug the exporter: every node's line of source, with the folders of this machine.
    ClearMetadataAndDocStringPass()(translated.model)
    graph = translated.model_proto
    for part in (graph.graph.input, graph.graph.output, graph.graph.value_info, graph.graph.initializer):
        for value in part:
            value.ClearField("metadata_props")
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _use_ordinary_operators(program: torch.export.ExportedProgram) -> None:
    """Put `linear` where a traced program calls oneDNN's, which frozen layers use and ONNX has no word for."""
    special = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    for node in program.graph.nodes:
        if special is not None and node.target is special.default:
            node.target, node.args = torch.ops.aten.linear.default, node.args[:3]
    program.graph_module.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter and its helpers from talking of their own affairs, under whatever names they do."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _verified(content: bytes, deployed: _Deployed, size: int) -> bool:
    """Compare ONNX Runtime's logits with torch's on random pixels; return False where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return False
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ModelFileError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the file: {_reason(error)}; nothing was written; try "
            "an older opset or a newer onnxruntime"
        ) from error
    draws = torch.Generator().manual_seed(1)
    for count in (1, 3):
        images = torch.rand(count, 3, size, size, generator=draws)
        expected = deployed(images)[1]
        got = torch.from_numpy(session.run(["logits"], {INPUT: images.numpy()})[0])
        if got.shape != expected.shape:
            raise ModelFileError(
                f"ONNX Runtime gives logits {tuple(got.shape)} where torch gives {tuple(expected.shape)}; nothing was "
                "written"
            )
        off = ((got - expected).abs() / expected.abs().clamp_min(1)).max().item()
        if not off <= TOLERANCE:  # also when it is not a number
            raise ModelFileError(
                f"ONNX Runtime's logits must be within {TOLERANCE:g} of torch's; they are {off:.2g} off for a batch of "
                f"{count}; nothing was written"
            )
    return True


def _check_size(deployed: _Deployed) -> None:
    total = sum(tensor.nbytes for tensor in (*deployed.parameters(), *deployed.buffers()))
    if total + _BESIDES > LARGEST:
        raise ConfigError(
            f"one ONNX file holds at most {LARGEST / 1e9:.2f} GB; in float32 this model takes {total / 1e9:.2f} GB; "
            "use a smaller backbone"
        )


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise ConfigError("exporting needs the packages onnx and onnxscript: pip install 'lamina[onnx]'") from None
    return onnx


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return tuple(map(float, values))  # type: ignore[return-value]  # `InputSpec` counts them


def _reason(error: BaseException) -> str:
    """Return the first line of what began it all, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
