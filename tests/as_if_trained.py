"""Run folders as training leaves them, but that their weights are where it would begin."""

from contextlib import closing
from pathlib import Path

from stf_jax.index import VideoIndex
from stf_jax.main import _data_facts
from stf_jax.records import Records
from stf_jax.run import Run, Settings, stamp_of, write_videos

STAGE = {"name": "second", "learning_rate": 1e-4, "epochs": 1, "seconds": 1.0}


def as_if_trained(settings: Settings, index: VideoIndex, records: Records, workdir: Path) -> Run:
    """Makes the folder of a run whose last stage is finished; it was not scored."""
    run = Run(workdir)
    run.claim(settings.config.as_configdict())
    stamp = stamp_of(index, settings)
    run.write_json("data.json", {**_data_facts(run, index, records, 1.0), "stamp": stamp})
    write_videos(run, index, records)
    with closing(run.best("second")) as best:
        params = settings.initial_params(settings.model(len(index.class_names)))
        best.save(1, params, {"stamp": stamp})
    run.write_json("stages/second/done.json", STAGE)
    return run
