"""Reads YAML strictly: refuses duplicate keys, and numbers that YAML 1.1 and YAML 1.2 read differently."""

from __future__ import annotations

import re
from typing import Any

import yaml

# YAML 1.1 reads 010 as 8 and 1:30 as 90; YAML 1.2 reads 10 and the text 1:30.
AMBIGUOUS_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE_TAG = "tag:yaml.org,2002:merge"  # the key <<, which copies the keys of another mapping


def load_yaml(text: str | bytes) -> Any:
    """Returns the values of one YAML document as plain Python values; None for an empty document.

    Raises: yaml.YAMLError: the YAML is invalid, a mapping has a key twice, or it contains an ambiguous number such as 010 or an
        invalid date such as 2024-13-01.
    """
    try:
        return yaml.load(text, _StrictYamlLoader)
    except (ValueError, RecursionError) as error:  # yaml 6.0 does not convert these two
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


class _StrictYamlLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys and ambiguous numbers."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Returns the node of a mapping after a check for duplicate keys.

        The check happens here because the construction of the mapping copies the keys of merged mappings into the node. Then a
        duplicate key could not be distinguished from an overridden one.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} appears twice, in line {lines[name]} and in line {line}; the first value would be "
                    "lost: merge the two entries, or remove one"
                )
            lines[name] = line
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Returns the node of a scalar after a check for ambiguous numbers."""
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if node.style is None and node.tag in _NUMBER_TAGS and AMBIGUOUS_NUMBER.fullmatch(node.value):
            meaning = self.construct_object(node)
            raise yaml.YAMLError(
                f"{node.value} in line {node.start_mark.line + 1} can mean the number {meaning} or other things: for text, put "
                f'quotes around it ("{node.value}"; in a shell \'"{node.value}"\'); for a number, write it without a leading '
                "zero and without colons"
            )
        return node
