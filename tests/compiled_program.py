"""Reading the text of a compiled XLA program."""

import re

import numpy as np

# Operations that make no array of their own.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}


def materialised(text, elements):
    """`opcode dtype[shape]` of every array of at least `elements` elements that a compiled program writes.

    What stands inside a fusion is computed on the fly; what the fusion itself gives is written.
    """
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
    inside -= set(re.findall(r" call\(.*?to_apply=%([\w.\-]+)", text))
    found, computation = [], None
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        elif made := re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(", line):
            if computation in inside or made[2] in FREE:
                continue
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", made[1]):
                if np.prod([int(n) for n in shape.split(",") if n]) >= elements:
                    found.append(f"{made[2]} {dtype}[{shape}]")
    return found
