"""Mistakes in what tools without our operators get, and C++ programs."""

from __future__ import annotations

from mutant import Mutant

PLAIN = "test_plain.py"
TORCHSCRIPT = "test_torchscript.py"
TO_PLAIN = "test_to_plain.py"
BENCH_COMMAND = "test_bench_command.py"
LIBRARIES = "test_libraries.py"

MUTANTS = (
    Mutant(
        "plain-not-looked-at",
        "gcnet_ext/ops/_dispatch.py",
        "if «plain or »_torch.inside_transform():",
        "",
        "Kernels run in gcnet_ext.plain().",
        (PLAIN,),
    ),
    Mutant(
        "operator-always-kept",
        "gcnet_ext/ops/_dispatch.py",
        "if recorded and «plain is None» and (not compiling",
        "False",
        "A trace holds our operator although nobody asked for it.",
        (TORCHSCRIPT,),
    ),
    Mutant(
        "switch-of-captures-left-on",
        "gcnet_ext/ops/_switch.py",
        "        latest = «choice.get()»",
        "enabled",
        "What is compiled or exported after gcnet_ext.plain() has no kernels.",
        (PLAIN,),
    ),
    Mutant(
        "program-keeps-the-operator",
        "gcnet_ext/ops/_dispatch.py",
        "if plain or («plain is None and torch.onnx.is_in_onnx_export()»):\n            return decomposition",
        "False",
        "An exported program cannot become ONNX.",
        (TORCHSCRIPT,),
    ),
    Mutant(
        "bit-of-a-nan",
        "gcnet_ext/ops/_relu_bits.py",
        "passes = «~(out <= 0)»",
        "out > 0",
        "In plain PyTorch the final ReLU stops the gradient at a NaN.",
        (PLAIN,),
    ),
    Mutant(
        "units-of-the-trace",
        "gcnet_ext/ops/_transform.py",
        "units = «len(weights.w1.unbind())»",
        "hidden.shape[1]",
        "The LayerNorm of a trace has a size that ONNX does not take.",
        (TORCHSCRIPT,),
    ),
    Mutant(
        "plain-copy-of-the-parameters",
        "gcnet_ext/models/plain.py",
        "copy.deepcopy(model«, shared»)",
        "",
        "to_plain gives the copy parameters of its own.",
        (TO_PLAIN,),
    ),
    Mutant(
        "plain-twin-without-a-position",
        "gcnet_ext/blocks/plain.py",
        "logits.masked_fill(«others & somewhere», float",
        "others",
        "In plain modules a sample in which no position counts has a NaN.",
        (TO_PLAIN,),
    ),
    Mutant(
        "plain-twin-of-a-hard-gate",
        "gcnet_ext/blocks/plain.py",
        "return (alpha * t + beta)«.clamp(0.0, 1.0)» if hard",
        ".clamp(0.0)",
        "The hard sigmoid of plain modules is not clipped at 1.",
        (TO_PLAIN,),
    ),
    Mutant(
        "gain-upside-down",
        "gcnet_ext/_bench.py",
        "gains = [«without / ours» for",
        "ours / without",
        "python -m gcnet_ext bench prints the loss for the gain.",
        (BENCH_COMMAND,),
    ),
    Mutant(
        "bench-of-one-model-twice",
        "gcnet_ext/_bench.py",
        "ours = «copy.deepcopy(without)»",
        "without",
        "The model without this package is the one with it.",
        (BENCH_COMMAND,),
    ),
    Mutant(
        "library-of-another-version",
        "csrc/python/bindings.cpp",
        "version = gcnet_ext_version(); «version != GCNET_EXT_VERSION»)",
        "false",
        "The module calls a library of another version, and crashes.",
        (LIBRARIES,),
    ),
    Mutant(
        "library-without-the-module",
        "gcnet_ext/_load.py",
        "        «loaded = found»\n",
        "pass",
        "C++ programs are not told of a library whose module is for another Python.",
        (LIBRARIES,),
    ),
    Mutant(
        "second-line-of-the-library",
        "gcnet_ext/__main__.py",
        '        if «"cuda" in _load.kernel_devices»:',
        "False",
        "The library of the CUDA kernels is not told.",
        (LIBRARIES,),
    ),
)
