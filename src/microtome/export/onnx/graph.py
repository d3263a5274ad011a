"""An ONNX graph in the making: nodes one behind the other, weights written out as they come.

Only operators of ONNX itself are used (opset 21), none of a runtime's own, so that any runtime can take the file.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from microtome.verdict import absent

OPSET = 21
INLINE = 1 << 26  # bytes of weights that the graph may hold: protobuf copies them five times, and ends at 2 GiB
SMALL = 1024  # bytes of a tensor that always lies in the graph: runtimes read shapes before they open the data
ALIGNED = 4096  # data starts at a multiple of this, so that it can be mapped
TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.int64: "INT64", torch.bool: "BOOL"}


def library() -> Any:
    """The package `onnx`."""
    try:
        import onnx
    except ImportError as error:
        raise absent("onnx", "onnx") from error
    return onnx


class Graph:
    """Nodes, constants and weights; `data` is the file for the weights, None where they lie in the graph itself.

    Floating-point weights are stored in `dtype`, float32 or float16. Values are named, and a name stands for a value.
    """

    def __init__(self, dtype: torch.dtype, data: Path | None = None) -> None:
        self.onnx = library()
        self.dtype = dtype
        self.data = data
        self.file: BinaryIO | None = None
        self.nodes: list[Any] = []
        self.stored: dict[str, Any] = {}  # name to tensor, as ONNX has it
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def __enter__(self) -> Self:
        if self.data is not None:
            self.file = self.data.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()

    def node(self, kind: str, inputs: Sequence[str], count: int = 1, **attributes: Any) -> list[str]:
        """An operator; its outputs' names."""
        out = [f"{kind}_{len(self.nodes)}" + (f"_{number}" if count > 1 else "") for number in range(count)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), out, **attributes))
        return out

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """An operator with one output."""
        return self.node(kind, inputs, **attributes)[0]

    def take(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """An input of the graph; a dimension with a name is free."""
        self.inputs.append(self.value(name, dtype, shape))
        return name

    def give(self, name: str, value: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """An output of the graph."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self.value(name, dtype, shape))

    def value(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Any:
        """Name, type and shape, as ONNX has them."""
        return self.onnx.helper.make_tensor_value_info(name, self.kind(dtype), list(shape))

    def kind(self, dtype: torch.dtype) -> int:
        """ONNX's number of a type."""
        return int(self.onnx.TensorProto.DataType.Value(TYPES[dtype]))

    def ints(self, *values: int) -> str:
        """A vector of whole numbers."""
        return self.constant(f"ints_{'_'.join(str(one) for one in values)}", torch.tensor(values, dtype=torch.int64))

    def number(self, value: float, dtype: torch.dtype | None = None) -> str:
        """A number in the graph's type, or another."""
        dtype = dtype or self.dtype
        return self.constant(f"{TYPES[dtype].lower()}_{value!r}", torch.tensor(value, dtype=dtype))

    def constant(self, name: str, tensor: Tensor) -> str:
        """A tensor of exactly this type, stored once under its name."""
        if name not in self.stored:
            self.stored[name] = self.proto(name, tensor.contiguous())
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """A tensor of numbers in the graph's type, stored once under its name."""
        return name if name in self.stored else self.constant(name, tensor.to(self.dtype))

    def proto(self, name: str, tensor: Tensor) -> Any:
        """A tensor as ONNX has it, its bytes in the data file where there is one."""
        raw = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
        made = self.onnx.TensorProto(name=name, data_type=self.kind(tensor.dtype), dims=list(tensor.shape))
        if self.file is None or self.data is None or len(raw) <= SMALL:
            made.raw_data = bytes(raw)
            return made
        self.file.write(bytes(-self.file.tell() % ALIGNED))
        made.data_location = self.onnx.TensorProto.EXTERNAL
        facts = {"location": self.data.name, "offset": self.file.tell(), "length": len(raw)}
        for key, value in facts.items():
            made.external_data.add(key=key, value=str(value))
        self.file.write(raw)
        return made

    def save(self, path: Path) -> None:
        """Write the graph; the data file is complete when the `with` statement ends."""
        from importlib.metadata import version

        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, list(self.stored.values()))
        opset = helper.make_opsetid("", OPSET)
        made = helper.make_model(
            graph,
            opset_imports=[opset],
            producer_name="microtome",
            producer_version=version("microtome"),
            ir_version=10,
        )
        path.write_bytes(made.SerializeToString())
