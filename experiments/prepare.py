"""Prepares the videos of a card without training: decodes, computes flow, encodes, packs.

    python experiments/prepare.py --config=configs/ucf101.py [--config.records.root=/big/disk]
    python experiments/prepare.py --config=configs/ucf101.py --verify
    python experiments/prepare.py --config=configs/ucf101.py --beam=--runner=FlinkRunner,...

Says first what it will take, from a sample, and stops if the disk would not hold it. Stopped or
killed at any moment, the same command does the rest. `--verify` checks a finished set against its
digests and its sources, decodes every record, and makes damaged shards again.

Exit code: 0 all is well; 1 it failed (the message says why); 2 the set is finished but some videos
cannot be used (they are listed, and training leaves them out); 3 `--verify` found damage, and
mended it.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import config_flags

if TYPE_CHECKING:
    from stf_jax.records import Records

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Experiment card, such as configs/ucf101.py or configs/ucf101.py:laptop."
)
_VERIFY = flags.DEFINE_bool("verify", False, "Check a finished set and mend what is damaged.")
_BEAM = flags.DEFINE_list(
    "beam", None, "Run on Apache Beam with these options of its own, such as --runner=FlinkRunner."
)


def main(argv: Sequence[str]) -> None:
    """Prepares or checks, and says what came out."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if _VERIFY.value and _BEAM.value is not None:
        raise app.UsageError("--verify mends on this machine: leave out --beam")
    from stf_jax.datasets import load_index
    from stf_jax.prepare import RecordSettings
    from stf_jax.progress import say

    code = 0
    try:
        settings = RecordSettings.of(_CONFIG.value.records)
        index = load_index(_CONFIG.value.data)
        say(index.summary())
        from stf_jax.records import prepare_records, verify_records

        if _VERIFY.value:
            checked = verify_records(index, settings)
            records = checked.records
            for line in checked.damage:
                say(f"  mended: {line}")
            for line in checked.retried:
                say(f"  tried again: {line}")
            say(f"{len(checked.damage)} kinds of damage found" if checked.damage else "all intact")
            code = 3 if checked.damage else 0
        else:
            records = prepare_records(index, settings, _BEAM.value)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("STF_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    unusable = _report(records)
    sys.exit(code or unusable)


def _report(records: "Records") -> int:
    """Lists what is not as it should be; returns 2 if a video cannot be used."""
    from stf_jax.progress import say

    rows = records.rows.values()
    for row in rows:
        if row.status != "ok":
            used = "used although it" if row.usable else "NOT USED:"
            say(f"  {row.video_id}: {used} {row.reason}")
    invalid = sum(not row.usable for row in rows)
    frames = sum(row.num_frames for row in rows if row.usable)
    say(
        f"{records.folder}: {len(rows) - invalid} videos, {frames} frames; {invalid} cannot be used"
    )
    return 2 if invalid else 0


if __name__ == "__main__":
    app.run(main)
