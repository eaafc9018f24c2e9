"""``cybermesh demo``: the whole mesh in one process, on the capture that ships with it or any other."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.demo.play import Demo, Story, Summary

Capture = Annotated[str | None, typer.Option("--capture", metavar="FILE", help="Another capture; - reads stdin.")]
Stopped = Annotated[
    list[int] | None, typer.Option("--stop-validator", metavar="N", min=1, max=4, help="Leave it out; repeatable.")
]
Keep = Annotated[Path | None, typer.Option("--keep", metavar="DIR", help="Leave genesis.json and proof.json there.")]
BLOCK_PACKETS = 2_048  # small, so that a verdict does not wait for the rest of a large block


def demo(
    capture: Capture = None,
    stop_validator: Stopped = None,
    keep: Keep = None,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
) -> None:
    """Play a capture through one detector, four validators and one agent, and verify the first decision's proof.

    Exit 0 only if all of it happened. Nothing is changed on this machine: the firewall of the demo is the noop backend.

    Examples: cybermesh demo · cybermesh demo --stop-validator 2 · cybermesh demo --capture trace.pcap --json
    """
    from cybermesh import log
    from cybermesh.demo import labels
    from cybermesh.demo.mesh import Detector
    from cybermesh.demo.play import Demo, Story
    from cybermesh.enforce.backends.noop import NoopBackend
    from cybermesh.roles.detection import open_detector
    from cybermesh.telemetry.sources.choose import open_source

    log.configure(level="debug" if output.is_debug() else "error")
    is_human = form is output.Format.HUMAN and not json
    path = Path(capture) if capture is not None else shipped_capture()
    truth = labels.beside(path)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(open_source(str(path), block=BLOCK_PACKETS)))
        scorer = open_detector()
        if scorer.without_classifier:
            output.note(f"without the classifier: {scorer.without_classifier}")
        detector = Detector(source, scorer.pipeline)
        story = Story()
        plan = Demo(detector, truth, NoopBackend(), tuple(sorted(set(stop_validator or ()))))
        summary = asyncio.run(_watched(plan, story, is_human))
    if is_human:
        _print(summary, path)
    else:
        output.emit_one(as_object(summary), form)
    if keep is not None:
        _keep(summary, keep)
    for problem in summary.problems:
        output.complain(problem)
    if summary.problems:
        raise typer.Exit(1)


def _keep(summary: Summary, directory: Path) -> None:
    """Write what `cybermesh verify` needs."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "genesis.json").write_bytes(summary.genesis)
        if summary.first_proof is not None:
            (directory / "proof.json").write_bytes(summary.first_proof)
    except OSError as error:
        raise output.CommandError(f"{directory}: cannot write there: {error.strerror}") from error
    output.note(f"try: cybermesh verify {directory}/proof.json --genesis {directory}/genesis.json")


def shipped_capture() -> Path:
    """Return the capture that comes with the package."""
    return Path(str(resources.files("cybermesh") / "data" / "demo.pcap"))


def as_object(summary: Summary) -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {
        "packets": summary.packets,
        "flows": summary.flows,
        "anomalies": summary.anomalies,
        "policies": summary.policies,
        "height": summary.height,
        "acks": summary.acks,
        "attacks_expected": summary.attacks_expected,
        "attacks_found": summary.attacks_found,
        "benign_blocked": summary.benign_blocked,
        "validators_agree": summary.validators_agree,
        "proof_verified": summary.proof_verified,
        "latency_ms": {"packet_to_ack_p50": summary.latency_p50_ms, "packet_to_ack_p99": summary.latency_p99_ms},
        "backend": summary.backend,
        "validators": {"up": summary.validators_up, "needed": summary.validators_needed},
        "problems": list(summary.problems),
    }


async def _watched(plan: Demo, story: Story, is_human: bool) -> Summary:
    """Play the demo while a display shows what happens; on a terminal as a live table, else as lines."""
    from cybermesh.cli.demo_display import Display
    from cybermesh.demo.play import play

    if not is_human:
        return await play(plan, story, lambda: None)
    with Display(plan, story) as display:
        return await play(plan, story, display.refresh)


def _print(summary: Summary, path: Path) -> None:
    """Print the outcome for people."""
    console = output.console()
    out = functools.partial(console.print, soft_wrap=True)
    out(f"[bold]{path.name}[/bold]: {summary.packets:,} packets, {summary.flows:,} flows, {summary.anomalies} alerts")
    expected = f" of {summary.attacks_expected} labelled attacks" if summary.attacks_expected else " attacks"
    out(f"  found      {summary.attacks_found}{expected}; {summary.benign_blocked} innocent hosts blocked")
    agree = "agree block by block" if summary.validators_agree else "do NOT agree"
    out(
        f"  decided    {summary.policies} policies at height {summary.height}; "
        f"{summary.validators_up} validators up, {summary.validators_needed} needed; they {agree}"
    )
    out(f"  enforced   {summary.acks} acks from the agent ({summary.backend} backend: this machine was not changed)")
    if summary.latency_p50_ms is not None:
        out(
            f"  latency    {summary.latency_p50_ms} ms median, {summary.latency_p99_ms} ms p99, "
            "from reading the decisive packet to the ack"
        )
    proven = "[green]verified[/green]" if summary.proof_verified else "[red]not verified[/red]" if summary.policies else "none"
    out(f"  proof      of the first decision: {proven}")
    out("  note       one detector cannot be corroborated, so this demo's genesis grants it a budget")
