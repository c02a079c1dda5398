"""Prints the table of DeepSpeed's JSON keys as Markdown, for ds_configs/README.md."""

from __future__ import annotations

from gptoughts.config.deepspeed_keys import BLOCKS, TOP_LEVEL


def markdown_table() -> str:
    """Every key with what becomes of it, one row each."""
    rows = ["| key | what becomes of it | how, or why not |", "|---|---|---|"]
    for prefix, rules in [("", TOP_LEVEL), *((f"{name}.", rules) for name, rules in BLOCKS.items())]:
        rows += [f"| `{prefix}{key}` | {rule.action} | {rule.note} |" for key, rule in rules.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown_table())
