"""The model card: what a trained classifier is, what it was made of, how good it is, and where it must not be believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cybermesh.detect.modelfile import Model

_LIMITS = """## Where it must not be believed
- It knows the network it was trained on. On another one, models of this kind find few attacks (published work and our own
  measurements agree: close to chance), so a benign verdict of a model that the site did not calibrate is no vote.
- The guard abstains on flows of one packet, on rows that contradict the feature definitions, on what no TCP stack sends, and on
  rows far from the training rows of the class claimed. It recognises other extractors, and traffic that is unlike the training
  data. It does **not** recognise attacks that look like benign training traffic: see the days above, whose attacks were mostly
  taken for benign rather than flagged.
- A single row whose columns another extractor fills alike (a TCP row with another window, a scan without payload whose first
  packet is counted twice) cannot be told apart; in a file, the other rows give it away.
- Class priors of the training table are artificial. Recall and false-positive rate carry over to a site like it, precision does
  not.
- Confidence is calibrated on later rows of the same network and capped by their number; on another network it is no frequency.
"""


def render(model: Model) -> str:
    """Return the card as Markdown; everything in it comes from the model's record."""
    record = model.record
    if record.get("made_by") in {"adapt", "calibrate"}:
        return _render_site(model)
    held_out = record["held_out"]
    lines = [
        f"# Model card: {model.name}",
        "",
        f"LightGBM over {len(model.inputs)} flow features: {record['rounds']} rounds, {len(model.classes)} classes.",
        "",
        "## Training data",
        f"- {record['rows']} rows, {record['variant']}; SHA-256 of the file `{record['data_sha256']}`",
        f"- terms: {record['terms']}",
        f"- rows by class: {_pairs(record['rows_by_class'])}",
        f"- rows left out: {_pairs(record['rows_left_out'])}",
        f"- seed {record['seed']}; {_pairs(record['versions'])}",
        "",
        "## Held-out figures",
        "Within each label, the first 70 % by time train, the rest tests; the delivered trees use all rows. 95 % intervals.",
        "",
        *_figures(held_out),
        "",
        "| class | rows | precision | recall | F1 | recall, interval |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['n']} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | "
            f"{_interval(held_out, f'{name}.recall')} |"
            for name, row in held_out["per_class"].items()
        ),
        "",
        "Classes with fewer than 100 rows are too few to judge by.",
        "",
        *_fingerprints(record["with_fingerprints"]),
        "",
        *_days(record["without_a_day"]),
        _LIMITS,
        "## Inputs",
        ", ".join(model.inputs),
        "",
        "Never inputs: addresses, identifiers, times of day, ports, the protocol number, first windows, the shortest header,",
        "and columns that the training table defines otherwise than the meter.",
        "",
    ]
    return "\n".join(lines)


def _render_site(model: Model) -> str:
    """Return the card of a model that was adapted or calibrated on a site."""
    record, base = model.record, model.record["base"]
    lines = [
        f"# Model card: {model.name}",
        "",
        f"Made by `cybermesh {record['made_by']}` from {base['name']} `{base['digest'][:16]}`; seed {record['seed']}.",
        f"Terms of the model it was made from: {base['terms']}",
        "",
        "## The site's rows",
        f"- ordinary traffic: {record['rows_of_ordinary_traffic']} flows, SHA-256 `{record['quiet_sha256'] or 'none'}`",
    ]
    if record["made_by"] == "adapt":
        lines += [
            f"- labelled: {record['rows']} ({_pairs(record['rows_by_class'])}), {record['variant']}",
            f"- SHA-256 of the labelled rows' file: `{record['data_sha256']}`",
            f"- left out: {_pairs(record['rows_left_out'])}; {_pairs(record['versions'])}",
        ]
        shown = {"in folds of these rows, each judged by trees that had not seen it": record["folds"]}
    else:
        shown = {"the model before, on the ordinary traffic": record["before"], "after": record["after"]}
    lines += ["", f"## Figures, benign false positives aimed at {record['fpr_max']:.2%} at most", ""]
    for title, figures in shown.items():
        lines += [f"{title}:", "", "| figure | value | 95 % interval |", "|---|---|---|"]
        lines += [
            f"| {key} | {figures[key]:.4f} | {_interval(figures, key)} |"
            for key in ("attack_recall", "benign_fpr", "ood_share")
            if key in figures
        ]
        lines.append("")
    lines += [
        "Rows of one day and one incident resemble each other: the next day may be worse than the folds. Types of attack that",
        "the site has not shown are remembered from the model before, with a confidence below what a policy needs.",
        "",
        f"Threshold: benign's log-probability is moved by {model.benign_shift:+.3f}.",
        "",
        _LIMITS,
        "## Inputs",
        ", ".join(model.inputs),
        "",
    ]
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any]) -> list[str]:
    names = {
        "macro_f1": "macro-F1, classes of at least 100 rows",
        "macro_f1_all": "macro-F1, all classes",
        "attack_recall": "attack recall (abstentions count as missed)",
        "benign_fpr": "benign false-positive rate",
        "auc": "AUC, attack against benign",
        "ece": "expected calibration error",
        "ood_share": "rows abstained on",
    }
    rows = ["| figure | value | interval |", "|---|---|---|"]
    for key, name in names.items():
        value = figures[key]
        rows.append(f"| {name} | {'none' if value is None else f'{value:.5f}'} | {_interval(figures, key)} |")
    return rows


def _fingerprints(compared: Mapping[str, Any]) -> list[str]:
    rows = [
        f"- {name} them: accuracy {row['accuracy']:.5f}, attack recall {row['attack_recall']:.5f}, "
        f"{row['false_positives']} false positives of {row['benign']}"
        for name, row in compared.items()
    ]
    return [
        "## Fingerprints of tools and systems",
        "Initial windows, the shortest header and the protocol number, bare trees on the same split:",
        "",
        *rows,
        "",
        "They are left out: what they add here is within the interval, and what they tell is the attacker's system.",
    ]


def _days(days: Mapping[str, Any]) -> list[str]:
    if not days:
        return []
    rows = [
        f"| {day} | {row['rows']} | {_share(row['attack_recall'])} | {_share(row['benign_fpr'])} | {_share(row['ood_share'])} |"
        for day, row in days.items()
    ]
    return [
        "## Without a day",
        "Trained without the day, measured on it: what attacks look like that it has never seen.",
        "",
        "| day | rows | attack recall | benign false positives | abstained |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _share(value: float | None) -> str:
    return "none there" if value is None else f"{value:.4f}"


def _interval(figures: Mapping[str, Any], key: str) -> str:
    interval = figures["intervals"].get(key)
    return "" if interval is None else f"{interval[0]:.5f} to {interval[1]:.5f}"


def _pairs(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in table.items()) or "none"
