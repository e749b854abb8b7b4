"""YAML text to plain values: refuses keys that appear twice, and numbers that versions of YAML read differently."""

from __future__ import annotations

import re
from typing import Any

import yaml

# YAML 1.1 reads 010 as 8 and 1:30 as 90; YAML 1.2 reads 10 and the text 1:30.
AMBIGUOUS_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE_TAG = "tag:yaml.org,2002:merge"  # the key <<, which takes over the keys of another mapping


def load_yaml(text: str | bytes) -> Any:
    """The values of one YAML document; None for an empty one.

    Raises: yaml.YAMLError: invalid YAML; a key that a mapping holds twice; a number such as 010; a date such as 2024-13-01.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except (ValueError, RecursionError) as error:  # yaml 6.0 lets both through
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks the keys here and not on construction, which copies the keys of merged mappings into the node."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} appears twice, in line {lines[name]} and in line {line}; the first would be lost: "
                    "join the two, or remove one"
                )
            lines[name] = line
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if node.style is None and node.tag in _NUMBER_TAGS and AMBIGUOUS_NUMBER.fullmatch(node.value):
            meaning = self.construct_object(node)
            raise yaml.YAMLError(
                f"{node.value} in line {node.start_mark.line + 1} can mean the number {meaning} or other things: for text, put "
                f'quotes around it ("{node.value}"; in a shell \'"{node.value}"\'); for a number, write it without a leading '
                "zero and without colons"
            )
        return node
