"""``cybermesh rules list|test|explain``: look at the detection rules and run their own tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output
from cybermesh.cli.detect import load_rules

if TYPE_CHECKING:
    from cybermesh.detect.engines.rule_file import Rule

rules = typer.Typer(no_args_is_help=True, help="List, test and explain the detection rules.")
Folder = Annotated[Path | None, typer.Option("--rules", help="Folder with rule files instead of the shipped ones.")]
RuleId = Annotated[str, typer.Argument(help="Rule id, as told by rules list.")]


@rules.command("list")
def list_(folder: Folder = None, form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False) -> None:
    """List the rules: id, type, what they look at, severity."""
    rule_set = load_rules(folder)
    form = output.Format.JSON if json else form
    if form is not output.Format.HUMAN:
        output.emit((_as_object(rule) for rule in rule_set.rules), form)
        return
    console = output.console()
    for rule in rule_set.rules:
        window = f"{rule.over} {rule.window_s} s" if rule.window_s else rule.over
        console.print(f"{rule.id:24} {rule.type:12} {window:18} severity {rule.severity}", markup=False, soft_wrap=True)
    output.note(f"{len(rule_set.rules)} rules, digest {rule_set.digest}")


@rules.command("test")
def run_tests(folder: Folder = None) -> None:
    """Run the examples inside the rules; exits with 1 if one does not come out as stated."""
    from cybermesh.detect.engines.rule_file import failures

    rule_set = load_rules(folder)
    bad = [(rule, failed) for rule in rule_set.rules for failed in failures(rule)]
    for rule, failed in bad:
        stated = "fires" if failed.fires else "does not fire"
        output.complain(f"{rule.path}:{rule.line}: {rule.id}: '{failed.name}' is stated to be one that {stated}, but is not")
    total = sum(len(rule.tests) for rule in rule_set.rules)
    output.note(f"{len(rule_set.rules)} rules, {total} tests, {len(bad)} failed")
    if bad:
        raise typer.Exit(1)


@rules.command()
def explain(
    rule_id: RuleId, folder: Folder = None, form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False
) -> None:
    """Show one rule: condition, confidence, references, and its examples."""
    import difflib

    rule_set = load_rules(folder)
    rule = next((rule for rule in rule_set.rules if rule.id == rule_id), None)
    if rule is None:
        near = difflib.get_close_matches(rule_id, [known.id for known in rule_set.rules], 1)
        hint = f"did you mean {near[0]}?" if near else "rules list shows them"
        raise output.CommandError(f"no rule {rule_id!r}; {hint}", 2)
    if json or form is not output.Format.HUMAN:
        output.emit_one(_as_object(rule), output.Format.JSON if json else form)
        return
    console = output.console()
    console.print(f"{rule.id}: {rule.type}, severity {rule.severity} ({rule.path}:{rule.line})", markup=False, soft_wrap=True)
    console.print(
        f"  looks at    {rule.over}" + (f", {rule.window_s} s" if rule.window_s else ""), markup=False, soft_wrap=True
    )
    console.print(f"  fires when  {rule.condition.text}", markup=False, soft_wrap=True)
    console.print(f"  confidence  {rule.confidence.text}", markup=False, soft_wrap=True)
    console.print(f"  says        {rule.explanation}", markup=False, soft_wrap=True)
    console.print(f"  references  {', '.join(rule.references)}", markup=False, soft_wrap=True)
    for example in rule.tests:
        console.print(f"  {'fires on   ' if example.fires else 'quiet on   '} {example.name}", markup=False, soft_wrap=True)


def _as_object(rule: Rule) -> dict[str, object]:
    return {
        "id": rule.id,
        "type": rule.type,
        "over": rule.over,
        "window_s": rule.window_s,
        "severity": rule.severity,
        "condition": rule.condition.text,
        "confidence": rule.confidence.text,
        "explanation": rule.explanation,
        "references": list(rule.references),
        "tests": [{"name": test.name, "fires": test.fires} for test in rule.tests],
        "file": rule.path,
        "line": rule.line,
    }
