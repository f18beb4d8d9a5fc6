"""`blockd daemon volume`: open the volume, or take it over, and serve it."""

from __future__ import annotations

from blockd.daemons import memory, opening, process
from blockd.daemons.options import Options, parser
from blockd.daemons.takeover import take_over
from blockd.daemons.volume import VolumeDaemon
from blockd.loop import Loop
from protocol.errors import BlockdError, StateError
from replication.authority import Authority, SqliteAuthority


def main(arguments: list[str]) -> int:
    """Open the volume and serve it until told to stop."""
    parsed = parser().parse_args(arguments)

    def serve() -> int:
        memory.protect()
        options = Options(parsed)
        authority = SqliteAuthority(options.state)
        loop = Loop()
        if options.take_over:
            daemon = take_over(loop, authority, options)
            process.on_signals(loop, daemon.stop)
            try:
                _ready(daemon)
            except (BlockdError, OSError) as error:  # nobody else serves the volume any more
                process.log(f"serving, but: {error}")
        else:
            daemon = _open(loop, authority, options)
        loop.run()
        daemon.close()
        return daemon.exit_code

    return process.run(serve)


def _open(loop: Loop, authority: Authority, options: Options) -> VolumeDaemon:
    """Open the volume; it is served once members that are a little behind have caught up."""
    wanted = opening.Wanted(
        options.name,
        options.volume_uuid,
        options.replicas,
        options.key,
        loop,
        options.consumer_alive,
        options.min_in_sync,
    )
    opened = opening.open_volume(authority, wanted, process.log)
    if opened.record.volume_name != options.name:
        raise StateError(
            f"volume {options.volume_uuid} is named {opened.record.volume_name}, not {options.name}"
        )
    daemon = VolumeDaemon(loop, authority, opened.record, opened.sessions, options)
    process.on_signals(loop, daemon.stop)

    def serving(error: BlockdError | None) -> None:
        if error is not None:
            process.log(str(error))
            daemon.exit_code = error.exit_code
            loop.stop()
            return
        daemon.serve()
        _ready(daemon)

    daemon.catch_up(opened.choice, serving)
    return daemon


def _ready(daemon: VolumeDaemon) -> None:
    process.write_pid_file(daemon.options.pid_file)
    where = ", ".join(server.address for server in daemon.servers) or "no NBD address"
    process.ready(f"volume {daemon.options.name} on {where}")
