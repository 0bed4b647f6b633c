"""What compiled code does with left operands of wgmma that it keeps in registers, read from nvdisasm's listing.

ptxas 12.9 and 13.0 can give a fragment that a loop only reads the registers of fragments that the loop writes: from the
second turn on, products multiply what is left there. No message says so, and no emulator of the source can see it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?(.*?) ;")
_PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
_WRITE = re.compile(r"(?!ST|RED|BAR|SYNCS|R2UR|HGMMA|BRA)([A-Z0-9_.]+) (?:U?P\w+, )*R(\d+)\b")
_WIDTH = {
    ".64": 2,
    ".128": 4,
    ".M88.4": 4,
    ".WIDE": 2,
}  # registers that an instruction with this in its name writes


def disassembler() -> Path | None:
    """nvdisasm, where `make dev` puts it (see nvrtc.txt), or among the installed packages; or None."""
    for place in (Path(sys.prefix, "nvrtc"), *map(Path, sys.path)):
        if (found := place / "nvidia" / "cu13" / "bin" / "nvdisasm").exists():
            return found
    return None


def listing(cubin: bytes) -> str:
    """The instructions of machine code."""
    tool = disassembler()
    assert tool is not None
    if not os.access(tool, os.X_OK):
        tool.chmod(0o755)  # the wheel forgets it
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def lost_fragments(text: str) -> list[str]:
    """Loops of a listing whose products read a register that other products of the loop have used up: at first it is read, then
    written, and at the end it is read again, so that the next turn begins with what was for another product.
    """
    found = []
    for name, body in re.findall(r"^\.text\.(\S+):$(.*?)(?=^\.text\.|\Z)", text, re.M | re.S):
        lines: list[str] = []
        labels: dict[str, int] = {}
        loops: list[tuple[int, int, str]] = []
        for line in body.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif instruction := _INSTRUCTION.match(line):
                lines.append(instruction[2])
                if (
                    instruction[1]
                    and (back := re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction[2]))
                    and back[1] in labels
                ):
                    loops.append(
                        (labels[back[1]], len(lines), back[1])
                    )  # waits that return from afar have no condition
        working = [loop for loop in loops if any(map(_PRODUCT.match, lines[loop[0] : loop[1]]))]
        for begin, end, label in working:
            if any(begin <= b and e <= end and (b, e) != (begin, end) for b, e, _ in working):
                continue  # an inner loop shows it, and only there does the order of lines say what happens
            uses = _uses(lines[begin:end])
            lost = sorted(r for r, order in uses.items() if re.fullmatch("r[rw]*w[rw]*r", order))
            found += [
                f"{name}: the loop at {label} loses the left operand of a product in R{r}" for r in lost
            ]
    return found


def _uses(lines: list[str]) -> dict[int, str]:
    """Of each register that is a left operand: r and w in the order in which it is read by products and written."""
    uses: dict[int, str] = {}
    for line in lines:
        if product := _PRODUCT.match(line):
            for r in range(int(product[1]), int(product[1]) + 4):
                uses[r] = uses.get(r, "") + "r"
        elif write := _WRITE.match(line):
            width = max((n for part, n in _WIDTH.items() if part in write[1]), default=1)
            for r in range(int(write[2]), int(write[2]) + width):
                uses[r] = uses.get(r, "") + "w"
    return {r: u for r, u in uses.items() if "r" in u}
