"""Files of other runtimes: ONNX, float or int8, and torch.export; how they are written and run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.distillation import Distillation
from hetkd.features.hooks import output_logits
from hetkd.models.description import KEY, Description
from hetkd.models.inputs import InputTransform
from hetkd.models.int8 import without_simulation
from hetkd.models.wrappers import unwrap

_INPUT, _OUTPUT = "images", "probabilities"
Runner = Callable[[Tensor], Tensor]


class Deployed(nn.Module):
    """A student as a graph: images to probabilities.

    Args:
        distillation: Whose student it is.
        preprocess: Take uint8 images of the student's size, and normalise them.
    """

    def __init__(self, distillation: Distillation, *, preprocess: bool) -> None:
        super().__init__()
        own = distillation.student_inputs
        self.model = without_simulation(unwrap(distillation.student))
        self.transform = InputTransform(own.spec, own.size)
        self.preprocess = preprocess

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the graph takes for uint8 images."""
        return images if self.preprocess else self.transform(images)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to probabilities ``[B, classes]``, of a segmenter ``[B, classes, h, w]`` at its own stride."""
        logits = output_logits(self.model(self.transform(images) if self.preprocess else images))
        assert logits is not None, "a student has logits"
        return logits.float().softmax(1)


def _shapes() -> dict[str, Any]:
    return {_INPUT: {0: torch.export.Dim("batch", min=1, max=65_536)}}


def write_onnx(deployed: Deployed, example: Tensor, path: Path, distillation: Distillation) -> None:
    """Write an ONNX file that takes any number of images."""
    import onnx

    torch.onnx.export(
        deployed,
        (example,),
        path,
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_shapes=_shapes(),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(path)
    for key, value in _metadata(distillation.describe_student(), deployed).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def write_pt2(deployed: Deployed, example: Tensor, path: Path, distillation: Distillation) -> None:
    """Write a file of torch.export that takes any number of images."""
    program = torch.export.export(deployed, (example,), dynamic_shapes=_shapes())
    torch.export.save(
        program, path, extra_files={"hetkd.json": json.dumps(_metadata(distillation.describe_student(), deployed))}
    )


def _metadata(description: Description, deployed: Deployed) -> dict[str, str]:
    takes = "uint8 [batch, channels, height, width]" if deployed.preprocess else "float, normalised"
    known = {"classes": json.dumps(description.classes)} if description.classes else {}
    return {KEY: description.to_json(), "takes": takes, **known}


def quantize(path: Path, inputs: list[Tensor]) -> None:
    """Replace a float ONNX file by one with int8 weights and activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.rest, None)
            return None if x is None else {_INPUT: x.numpy()}

    prepared, quantized = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, prepared)
    quantize_static(
        prepared,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    os.replace(quantized, path)


def onnx_runner(path: Path) -> Runner:
    """Return what runs an ONNX file on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {_INPUT: images.numpy()})[0])

    return run


def pt2_runner(path: Path) -> Runner:
    """Return what runs a file of torch.export."""
    module = torch.export.load(path).module()
    return lambda images: module(images)
