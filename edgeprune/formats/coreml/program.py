"""A Core ML program as data: operations, and constants as arrays. Reads the file that ships, not what the converter had in memory.

Source of the messages: ``MIL.proto`` of coremltools 9.0; of the weight file: ``MILBlob/Blob/StorageFormat.hpp`` of the same release
(a header of 64 bytes; before each blob 64 bytes of metadata: sentinel 0xDEADBEEF, data type, size and offset of the data).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import FormatError
from edgeprune.formats.coreml.package import main_block

_SENTINEL = 0xDEADBEEF
_BLOB = struct.Struct("<IIQQ")
# Names of MIL.proto's DataType.
DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "FLOAT16": "float16",
    "FLOAT32": "float32",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT16": "int16",
    "UINT16": "uint16",
    "INT32": "int32",
}
WEIGHTED = ("conv", "conv_transpose", "linear")
DEQUANTIZED_WEIGHT = "constexpr_affine_dequantize"


@dataclass(frozen=True)
class MilOperation:
    """One operation. ``inputs`` names the values it reads, in order for a list of them; ``constants`` are those written into it."""

    type: str
    inputs: dict[str, tuple[str, ...]]
    constants: dict[str, Any]
    outputs: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the outputs; "" for what is no tensor
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MilProgram:
    """The operations of a program without its plain constants, which ``constants`` has by name."""

    operations: tuple[MilOperation, ...]
    constants: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def argument(self, operation: MilOperation, name: str) -> Any:
        """A constant argument of an operation, wherever it stands; ``None`` where it has none."""
        if name in operation.constants:
            return operation.constants[name]
        names = operation.inputs.get(name, ())
        return self.constants[names[0]] if names and names[0] in self.constants else None

    def weights(self) -> Iterator[tuple[MilOperation, np.ndarray, np.ndarray | None]]:
        """Every operation with a weight: the weight as ``float32``, and the step of each output channel where it is stored in 8 bits."""
        made = {o.outputs[0]: o for o in self.operations if o.type == DEQUANTIZED_WEIGHT}
        for operation in self.operations:
            if operation.type not in WEIGHTED:
                continue
            (name,) = operation.inputs.get("weight", ("",))
            if name in made:
                value, step = dequantized(made[name])
                yield operation, value, step
            else:
                yield operation, np.asarray(self.argument(operation, "weight"), np.float32), None

    def counts(self) -> dict[str, int]:
        """Operations by type; ``int8:conv`` those whose input and weight are 8 bits wide; ``weights:int8`` the weights by stored type."""
        made = {output: o.type for o in self.operations for output in o.outputs}
        counts = Counter(o.type for o in self.operations)
        for operation, _, step in self.weights():
            stored = "int8" if step is not None else self._stored(operation)
            counts[f"weights:{stored}"] += 1
            x = operation.inputs.get("x", ("",))[0]
            if step is not None and made.get(x) == "dequantize":
                counts[f"int8:{operation.type}"] += 1
        return dict(sorted(counts.items()))

    def _stored(self, operation: MilOperation) -> str:
        return str(np.asarray(self.argument(operation, "weight")).dtype)


def dequantized(operation: MilOperation) -> tuple[np.ndarray, np.ndarray]:
    """The values of a weight that is stored in 8 bits, ``scale * (stored - zero_point)`` along its axis, and the steps: ``float32``."""
    stored = np.asarray(operation.constants["quantized_data"], np.float32)
    axis = int(np.asarray(operation.constants.get("axis", 0)))
    shape = [-1 if i == axis % stored.ndim else 1 for i in range(stored.ndim)]
    scale, zero = (
        np.asarray(operation.constants[key], np.float32).reshape(-1)
        for key in ("scale", "zero_point")
    )
    steps = np.broadcast_to(scale, (stored.shape[axis],)) if scale.size == 1 else scale
    wide = (scale.reshape(shape) if scale.size > 1 else scale, zero)
    centred = stored - (zero.reshape(shape) if zero.size > 1 else wide[1])
    return centred * wide[0], steps


def program_of(spec: Any, weights: bytes) -> MilProgram:
    """The program of a message ``Model`` with its weight file.

    Raises:
        FormatError: a weight file that is not sound.
    """
    block = main_block(spec)
    operations: list[MilOperation] = []
    constants: dict[str, Any] = {}
    for found in block.operations:
        attributes = {
            key: _value(value, weights)
            for key, value in found.attributes.items()
            if key != "name" and not value.type.HasField("dictionaryType")
        }
        if found.type == "const":
            constants[found.outputs[0].name] = attributes["val"]
            continue
        inputs: dict[str, tuple[str, ...]] = {}
        for key, argument in found.inputs.items():
            names = [binding.name for binding in argument.arguments]
            if all(names):
                inputs[key] = tuple(names)
            else:
                attributes[key] = _value(argument.arguments[0].value, weights)
        kinds = [_tensor_type(output.type) for output in found.outputs]
        operations.append(
            MilOperation(
                type=found.type,
                inputs=inputs,
                constants=attributes,
                outputs=tuple(output.name for output in found.outputs),
                dtypes=tuple(dtype for dtype, _ in kinds),
                shapes=tuple(shape for _, shape in kinds),
            )
        )
    function = spec.mlProgram.functions["main"]
    return MilProgram(
        tuple(operations),
        constants,
        tuple(value.name for value in function.inputs),
        tuple(block.outputs),
    )


def _tensor_type(kind: Any) -> tuple[str, tuple[int, ...]]:
    from coremltools.proto import MIL_pb2

    if not kind.HasField("tensorType"):
        return "", ()
    name = MIL_pb2.DataType.Name(kind.tensorType.dataType)
    shape = tuple(int(d.constant.size) for d in kind.tensorType.dimensions)
    return DTYPES.get(name, ""), shape


def _value(value: Any, weights: bytes) -> Any:
    """A constant: an array, or a plain text, or a list of such."""
    dtype, shape = _tensor_type(value.type)
    if value.HasField("blobFileValue"):
        return _blob(weights, int(value.blobFileValue.offset), dtype, shape)
    immediate = value.immediateValue
    if immediate.HasField("list"):
        return [_value(item, weights) for item in immediate.list.values]
    tensor = immediate.tensor
    kind = tensor.WhichOneof("value")
    if kind == "bytes":
        return np.frombuffer(tensor.bytes.values, dtype).reshape(shape)
    if kind == "strings":
        texts = [str(text) for text in tensor.strings.values]
        return texts if shape else texts[0]
    numbers = [] if kind is None else getattr(tensor, kind).values
    return np.array(list(numbers), dtype or None).reshape(shape)


def _blob(weights: bytes, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        sentinel, _, size, start = _BLOB.unpack_from(weights, offset)
        if sentinel != _SENTINEL or start + size > len(weights):
            raise ValueError("its metadata is damaged")
        # A blob may be longer than its array: it is padded to a whole number of bytes.
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(weights, dtype, count, start).reshape(shape)
    except (struct.error, ValueError) as error:
        raise FormatError(f"the weight file has no {dtype} at {offset}: {error}") from error
