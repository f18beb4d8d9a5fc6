"""`blockd doctor`: what works on this machine, and what to install or load for the rest."""

from __future__ import annotations

from dataclasses import asdict

import click

from blockd.cli import output as out
from blockd.cli.common import Settings, output_option, pass_settings
from blockd.cli.machine import Finding, examine, has_device_front_end
from blockd.client import Json
from protocol.errors import BlockdError, DegradedError

_MARKS = {True: "ok", None: "-", False: "BAD"}


@click.command(
    epilog="""\b
Examples:
  blockd doctor
  blockd doctor -o json | jq '.findings[] | select(.ok != true)'

Ends with 6 if volumes cannot become block devices on this machine.
"""
)
@output_option
@pass_settings
def doctor(settings: Settings, output: str) -> None:
    """Say what of blockd works on this machine, and what to install or load for the rest."""
    findings = examine(settings.home)
    device = has_device_front_end(findings)
    findings.append(_node_service(settings))
    answer = {"device": device, "findings": [asdict(finding) for finding in findings]}

    def table(answer: Json) -> None:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            click.echo(f"{_MARKS[finding.ok]:4}{finding.check:{width}}  {finding.text}")

    out.show(answer, output, table)
    if not device:
        raise DegradedError(
            "no front end here gives a block device; volumes can be used as NBD addresses: "
            "`blockd volume attach NAME --frontend socket`"
        )


def _node_service(settings: Settings) -> Finding:
    try:
        with settings.client() as client:
            status = client.status()
    except BlockdError as error:
        return Finding("node service", None, f"not reachable: {error}")
    return Finding("node service", True, f"runs (pid {status['pid']}), home {status['home']}")
