"""PTX, the assembly that compilers make for NVIDIA's GPUs, taken apart for `ptx.machine`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

Operand = str | tuple[str, ...]  # "%r1", "5", "[%rd1+8]"; a list in braces


@dataclass
class Instruction:
    """``@guard opcode.part.part operands``; the guard is a predicate's name, with ``!`` before it if negated."""

    guard: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


@dataclass
class Kernel:
    """An ``.entry``: parameters (name to offset and bytes), registers (name to bits; 1: predicate), code.

    labels: name to the index of the instruction that follows. shared: variables (name to offset); what is not declared
    with a size lies behind the ``static_bytes`` of the others.
    """

    name: str
    threads: int
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_bytes: int = 0
    code: list[Instruction] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


def _operands(text: str) -> tuple[Operand, ...]:
    """Split at commas outside brackets; ``a|b`` becomes two."""
    found: list[Operand] = []
    for piece in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        piece = piece.strip()
        if piece.startswith("{"):
            found.append(tuple(name.strip() for name in piece[1:-1].split(",")))
        elif piece.startswith("["):
            found.append("[" + re.sub(r"\s", "", piece[1:-1]).replace("+-", "-") + "]")
        else:
            found.extend(part.strip() for part in piece.split("|"))
    return tuple(found)


def _instruction(text: str) -> Instruction:
    guard = ""
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
    opcode, _, rest = text.partition(" ")
    return Instruction(guard, tuple(opcode.replace("::", "_").split(".")), _operands(rest), text)


def _declare(kernel: Kernel, text: str) -> None:
    """``.reg`` and ``.shared`` variables."""
    if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
        bits = 1 if match[1] == "pred" else int(re.sub(r"\D", "", match[1]))
        for name in match[2].split(","):
            name, _, count = name.strip().partition("<")
            names = [f"{name}{i}" for i in range(int(count[:-1]))] if count else [name]
            kernel.registers.update(dict.fromkeys(names, bits))
    elif match := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$.]+)\[(\d+)\]", text):
        at = -(-kernel.static_bytes // int(match[1])) * int(match[1])
        kernel.shared[match[2]], kernel.static_bytes = at, at + int(match[3])
    elif not text.startswith((".loc", ".pragma", ".section", ".file", ".b8", ".b32", ".b64")):
        raise ValueError(f"declaration not known: {text}")


def _header(kernel: Kernel, text: str) -> None:
    at = 0
    for match in re.finditer(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)", text, re.MULTILINE):
        kind = re.search(r"\.[busf](\d+)", match[1])
        assert kind is not None, match[0]
        size = int(match[3]) if match[3] else int(kind[1]) // 8
        align = re.match(r"\.align\s+(\d+)\s+\.b8", match[1])
        step = int(align[1]) if align else size
        at = -(-at // step) * step
        kernel.parameters[match[2]] = (at, size)
        at += size


def parse(text: str) -> dict[str, Kernel]:
    """The entries of a module by name."""
    inline = (
        r"// begin inline asm(.*?)// end inline asm"  # may have a scope of its own, whose end looks like the entry's
    )
    text = re.sub(inline, lambda found: re.sub(r"(?m)^[{}]\s*$", "", found[1]), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    kernels = {}
    dynamic = re.findall(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\[\]", text)
    pattern = r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{(.*?)\n\}"
    for name, header, directives, body in re.findall(pattern, text, re.DOTALL):
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
        kernel = Kernel(name, int(threads[1]) if threads else 0)
        _header(kernel, header)
        body = re.sub(r"\.loc[^\n]*", "", body)
        body = re.sub(r"(?m)^\s*([$\w]+):", r"\1: ;", body)  # a label is a statement of its own
        for statement in re.sub(r"(?m)^\s*[{}]\s*$", "", body).split(";"):
            statement = " ".join(statement.split())
            statement = re.sub(r"^(?:[{}]\s+)+(?=[.@a-z])", "", statement).strip()  # a scope begins or ends
            if statement in ("", "{", "}"):
                continue
            if label := re.fullmatch(r"([$\w]+):", statement):
                if label[1] in kernel.labels:  # of a scope of its own
                    raise ValueError(f"a label twice: {label[1]}")
                kernel.labels[label[1]] = len(kernel.code)
            elif statement.startswith("."):
                _declare(kernel, statement)
            else:
                kernel.code.append(_instruction(statement))
        kernel.shared.update(dict.fromkeys(dynamic, kernel.static_bytes))
        kernels[name] = kernel
    return kernels
