"""Records the class and the attributes of a block, on which its result depends, and tells whether they have changed."""

from __future__ import annotations

import enum
import hashlib
import types
from typing import Any

import torch
from torch import nn

from ..blocks._fused import NOT_COPIED
from .skeleton import Left

STANDARD = frozenset(vars(nn.Module())) | {"_record", *NOT_COPIED}
"""The fields that every module has, and ours."""
CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, type),
    *(types.FunctionType, types.BuiltinFunctionType),
)
SPECIAL = ("__call__", "__getattr__", "__getattribute__", "__init__")

ClassFields = tuple[tuple[type, str, Any], ...]


def class_fields(kind: type) -> ClassFields:
    """The methods and attributes of a class and of its bases up to nn.Module."""
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    return tuple(
        (base, name, value)
        for base in bases
        for name, value in vars(base).items()
        if name in SPECIAL or not name.startswith("__")
    )


def are_same(fields: ClassFields, others: ClassFields) -> bool:
    return len(fields) == len(others) and all(
        base is other_base and name == other and value is other_value
        for (base, name, value), (other_base, other, other_value) in zip(fields, others, strict=True)
    )


def fingerprint(kind: type) -> str:
    """A hash that changes whenever the code of the class does."""
    digest = hashlib.sha256()
    for _, name, value in class_fields(kind):
        code = getattr(value, "__code__", None)
        told = repr(value) if code is None and isinstance(value, CONSTANTS) else ""
        digest.update(repr((name, told) if code is None else (name, code.co_code, code.co_names, _constants(code))).encode())
    return digest.hexdigest()


def _constants(code: types.CodeType) -> list[Any]:
    """The constants of a function's code, in a form that is the same in every process."""
    return [
        _constants(each)
        if isinstance(each, types.CodeType)
        else sorted(map(repr, each))
        if isinstance(each, frozenset)
        else repr(each)
        for each in code.co_consts
    ]


def shadowed(block: nn.Module) -> str:
    """A method of the class that a field of the block itself stands in front of, if there is one."""
    methods = {name for _, name, value in class_fields(type(block)) if callable(value)}
    return next((name for name in vars(block) if name in methods), "")


def own_fields(block: nn.Module) -> dict[str, Any]:
    """What somebody has put on the block besides parameters, buffers and submodules, in a form that does not change."""
    return {name: frozen(name, value) for name, value in vars(block).items() if name not in STANDARD}


def frozen(name: str, value: Any) -> Any:
    """
    Raises:
        Left: nobody can see when the value changes.
    """
    if isinstance(value, CONSTANTS):
        return value
    if isinstance(value, (tuple, list)):
        return (type(value), *(frozen(name, each) for each in value))
    if isinstance(value, dict):
        return dict, tuple((frozen(name, key), frozen(name, each)) for key, each in value.items())
    raise Left(f"its attribute {name} ({type(value).__name__}) may change unseen, and with it what the block computes")


def is_constant(value: Any) -> bool:
    """Whether the value stays what it is as long as it is the same object."""
    return isinstance(value, CONSTANTS) or (isinstance(value, tuple) and all(is_constant(each) for each in value))
