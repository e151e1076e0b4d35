"""Copies a block over its namesakes in all other scripts: python tests/sync_blocks.py hyper.py:EnsembleDynamics"""

import ast
import sys
from pathlib import Path


def span(path: Path, name: str) -> tuple[int, int] | None:
    """First and last line (0-based, half open) of a top-level function or class, decorators included."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno
    return None


def main() -> None:
    for word in sys.argv[1:]:
        source, name = word.split(":")
        found = span(Path(source), name)
        if found is None:
            sys.exit(f"{source} has no block {name}")
        block = Path(source).read_text().splitlines()[slice(*found)]
        for path in sorted(Path(source).parent.glob("*.py")):
            place = span(path, name)
            if place and path.name != Path(source).name:
                lines = path.read_text().splitlines()
                lines[slice(*place)] = block
                path.write_text("\n".join(lines) + "\n")
                print(f"{name}: {source} -> {path}")


if __name__ == "__main__":
    main()
