"""Classifies videos, streams and cameras with a finished run, at once or over time.

    python experiments/predict.py --workdir=runs/demo INPUT [INPUT ...] [--top=5]

An INPUT is a video file, a folder (every video in it and below), the address of a stream
(http://..., udp://..., pipe:0) or a camera (/dev/video0, or --camera=0). --workdir may be an
exported model.safetensors too.

A file of at most 2,000 frames is classified as the evaluation would, in one piece. Longer ones,
streams and cameras are divided into windows:
    --window=5s --hop=2.5s    or in frames: --window=120f
    --threshold=0.5           probability below which a time has no label
    --timeline=FOLDER         writes the labels with start and end, as CSV and as a picture each
    --annotate=out.mp4        writes the video with its labels and flow (of one input)
    --json                    one JSON object per line: windows as they come, videos, errors
    --latency=FILE            the table of latencies as CSV; it is printed in any case
    --live                    plays files in real time, as a camera would

A live input that is faster than the network loses its oldest waiting frames; how many is said.
Ctrl-C ends with what was found until then.

Exit code 1 if an input could not be used; the others are still classified.
"""

import itertools
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from stf_jax import host, startup

if TYPE_CHECKING:
    from stf_jax.timeline import AnnotatedVideo, Piece
    from stf_jax.watch import Input, Scored, Watcher, Watching

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, or an exported file.", required=True
)
_TOP = flags.DEFINE_integer("top", 5, "Classes to print per input.", lower_bound=1)
_CAMERA = flags.DEFINE_multi_string("camera", [], "Number or device of a camera.")
_WINDOW = flags.DEFINE_string("window", "", "Of what length, such as 5s or 120f.")
_HOP = flags.DEFINE_string("hop", "", "From window to window; half of one if empty.")
_THRESHOLD = flags.DEFINE_float(
    "threshold", 0.5, "Least probability of a label.", lower_bound=0, upper_bound=1
)
_TIMELINE = flags.DEFINE_string("timeline", "", "Folder for timeline.csv and pictures.")
_ANNOTATE = flags.DEFINE_string("annotate", "", "MP4 file to write with labels.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON lines.")
_LATENCY = flags.DEFINE_string("latency", "", "CSV file for the table of latencies.")
_LIVE = flags.DEFINE_bool("live", False, "Play in real time and drop what comes too fast.")
_TIMEOUT = flags.DEFINE_float("timeout", 10.0, "Seconds to wait for a stream.", lower_bound=0.1)


def main(argv: Sequence[str]) -> None:
    """Prints the classes of each input, most probable first."""
    cameras = [f"/dev/video{c}" if c.isdecimal() else c for c in _CAMERA.value]
    names = [*argv[1:], *cameras]
    if not names:
        raise app.UsageError("name at least one video, folder, stream or camera")
    if _ANNOTATE.value and (len(names) > 1 or Path(names[0]).is_dir()):
        raise app.UsageError("--annotate writes one video: name one input, and no folder")
    if _ANNOTATE.value and Path(_ANNOTATE.value).suffix.lower() != ".mp4":
        raise app.UsageError(f"--annotate={_ANNOTATE.value}: expected a name that ends in .mp4")
    if _ANNOTATE.value and Path(_ANNOTATE.value).resolve() == Path(names[0]).resolve():
        raise app.UsageError("--annotate would overwrite its input: give it another name")
    for place in filter(None, (_ANNOTATE.value, _LATENCY.value)):
        if not Path(place).parent.is_dir():
            raise app.UsageError(f"{place}: there is no folder {Path(place).parent}")
    from stf_jax.predict import Predictor
    from stf_jax.watch import Watcher, WindowSettings, latency_table, write_latency

    try:
        predictor = Predictor.load(_WORKDIR.value)
        windows = WindowSettings.parse(_WINDOW.value, _HOP.value, predictor.settings.sampling)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if predictor.warning:
        print(f"note: {predictor.warning}", file=sys.stderr)
    watcher = Watcher(predictor, windows)
    started = watcher.start_up()
    with _interruptible() as stop:
        session = _Session(watcher, stop)
        failed = session.run(names)
    rows = latency_table(session.scored)
    _print_latency(rows, started)
    if _LATENCY.value and rows:
        write_latency(Path(_LATENCY.value), rows)
    sys.exit(128 + signal.SIGINT if session.cut_short else int(failed))


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one ends the program."""
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _Session:
    """All inputs of one call.

    Attributes:
      scored: every window.
      cut_short: whether something that has an end was interrupted before it.
    """

    def __init__(self, watcher: "Watcher", stop: threading.Event) -> None:
        self._watcher, self._stop = watcher, stop
        self._classes = watcher.predictor.class_names
        self._segments: dict[str, Any] = {}
        self._pictures: set[str] = set()
        self.scored: list[Scored] = []
        self.cut_short = False

    def run(self, names: Sequence[str]) -> bool:
        """Watches each; returns whether one failed."""
        from stf_jax.timeline import write_timeline
        from stf_jax.video import VideoFault
        from stf_jax.watch import expand, open_input

        settings, failed = self._watcher.predictor.settings, False
        if _TIMELINE.value:
            Path(_TIMELINE.value).mkdir(parents=True, exist_ok=True)
        for name, wrong in expand(names):
            if self._stop.is_set():
                self.cut_short = True
                break
            try:
                if wrong:
                    raise OSError(wrong)
                source = open_input(
                    name,
                    max_pixels=settings.records.max_pixels,
                    live=_LIVE.value,
                    timeout=_TIMEOUT.value,
                )
                self._watch(source)
            except (VideoFault, OSError, ValueError) as fault:
                print(f"{name}\n  error: {fault}", file=sys.stderr)
                if _JSON.value:
                    _print_json(kind="error", input=name, error=str(fault))
                failed = True
        if _TIMELINE.value:
            write_timeline(Path(_TIMELINE.value) / "timeline.csv", self._segments)
        return failed

    def _watch(self, source: "Input") -> None:
        from stf_jax.timeline import AnnotatedVideo, pieces
        from stf_jax.video import VideoFault

        if not _JSON.value:
            print(source.name, flush=True)
        fault: Exception | None = None
        with ExitStack() as stack:
            latest: list[Scored] = []
            keep = None
            if _ANNOTATE.value and (source.live or source.file is None):
                # Nothing of it can be read again: each frame gets what was known when it came.
                video = stack.enter_context(AnnotatedVideo(Path(_ANNOTATE.value)))
                keep = self._captioned(video, latest)
            watching = self._watcher.watch(source, stop=self._stop, keep=keep)
            try:
                for scored in watching:
                    latest.append(scored)
                    self._say_window(source, scored)
            except (VideoFault, OSError) as error:
                fault = error  # what was found before is right
        self.scored += latest
        made = pieces(latest)
        if made:
            self._conclude(source, watching, made, len(latest))
        if fault is not None:
            raise fault
        if broken := getattr(source.source, "broken", ""):
            raise OSError(f"{source.name}: {broken}; what is above was found until then")

    def _captioned(self, video: "AnnotatedVideo", latest: list["Scored"]) -> Any:
        from stf_jax.timeline import Caption, FlowInset, caption_of

        inset = FlowInset(self._watcher.predictor.settings.records)

        def keep(frame: Any, seconds: float) -> None:
            caption = Caption("", 0.0, False)
            if latest:
                probabilities = latest[-1].prediction.probabilities
                caption = caption_of(probabilities, self._classes, _THRESHOLD.value)
            video.write(frame, seconds, caption, inset.after(frame))

        return keep

    def _say_window(self, source: "Input", scored: "Scored") -> None:
        from stf_jax.timeline import clock_time

        (label, probability), *_ = scored.prediction.top(1)
        if _JSON.value:
            _print_json(
                kind="window",
                input=source.name,
                start=round(scored.start, 6),
                end=round(scored.end, 6),
                frames=scored.frames,
                label=label,
                probability=round(probability, 6),
                probabilities=self._named(scored.prediction.probabilities),
                latency_ms={k: round(1e3 * v, 3) for k, v in scored.latency.items()},
                lag_ms=round(1e3 * scored.lag, 3),
            )
        elif source.live or source.file is None:
            times = f"{clock_time(scored.start)} to {clock_time(scored.end)}"
            print(f"  {times}  {probability:6.1%}  {label}", flush=True)

    def _conclude(
        self, source: "Input", watching: "Watching", made: Sequence["Piece"], windows: int
    ) -> None:
        from stf_jax.predict import Prediction
        from stf_jax.timeline import draw_timeline, mean_probabilities, segments

        found = segments(made, self._classes, _THRESHOLD.value)
        self._segments[source.name] = found
        whole = Prediction(self._classes, mean_probabilities(made))
        self._notes(source, watching)
        if _JSON.value:
            self._say_video_json(source, watching, whole, found, windows)
        else:
            _say_video(whole, found, windows)
        if _TIMELINE.value:
            picture = self._picture(source.name)
            draw_timeline(picture, source.name, made, found, self._classes)
        if _ANNOTATE.value and source.file is not None and not source.live:
            self._annotate(source, made)

    def _notes(self, source: "Input", watching: "Watching") -> None:
        if self._stop.is_set():
            live = source.live or source.file is None
            self.cut_short = self.cut_short or not live
            where = f"after {watching.seconds:.1f} s"
            print(f"note: {source.name}: interrupted {where}", file=sys.stderr)
        if watching.dropped:
            total = watching.frames + watching.dropped
            print(
                f"note: {source.name}: {watching.dropped} of {total} frames were dropped, always "
                "the oldest that waited: the network is slower than the source",
                file=sys.stderr,
            )

    def _say_video_json(
        self, source: "Input", watching: "Watching", whole: Any, found: Any, windows: int
    ) -> None:
        (label, probability), *_ = whole.top(1)
        _print_json(
            kind="video",
            input=source.name,
            seconds=round(watching.seconds, 6),
            frames=watching.frames,
            dropped=watching.dropped,
            windows=windows,
            interrupted=self._stop.is_set(),
            label=label,
            probability=round(probability, 6),
            probabilities=self._named(whole.probabilities),
            segments=[
                {
                    "start": round(one.start, 6),
                    "end": round(one.end, 6),
                    "label": one.label,
                    "probability": round(one.probability, 6),
                }
                for one in found
            ],
        )

    def _named(self, probabilities: Any) -> dict[str, float]:
        pairs = zip(self._classes, probabilities.tolist(), strict=True)
        return {name: round(value, 6) for name, value in pairs}

    def _picture(self, name: str) -> Path:
        """A file of its own for each input, with a name that says of which."""
        stem = Path(name).stem or "input"
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        chosen = next(name for name in names if name not in self._pictures)
        self._pictures.add(chosen)
        return Path(_TIMELINE.value) / f"{chosen}.png"

    def _annotate(self, source: "Input", made: Sequence["Piece"]) -> None:
        """Reads the file again: its labels are known only now."""
        from stf_jax.timeline import Captions, FlowInset, annotate

        captions = Captions(made, self._classes, _THRESHOLD.value)
        inset = FlowInset(self._watcher.predictor.settings.records)
        annotate(Path(_ANNOTATE.value), source.source, captions, inset)


def _say_video(whole: Any, found: Any, windows: int) -> None:
    from stf_jax.timeline import clock_time

    for label, probability in whole.top(_TOP.value):
        print(f"  {probability:7.2%}  {label}")
    if windows == 1:
        return
    print(f"  over time, {windows} windows:")
    for one in found:
        times = f"{clock_time(one.start)} to {clock_time(one.end)}"
        print(f"    {times}  {one.probability:6.1%}  {one.label}")
    if not found:
        print(f"    nothing as probable as {_THRESHOLD.value:g}")


def _print_json(**values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)


def _print_latency(rows: Sequence[Any], started: float) -> None:
    print(f"latency per window, ms (start-up took {started:.1f} s)", file=sys.stderr)
    for row in rows:
        stage, p50, p95 = row["stage"], row["p50_ms"], row["p95_ms"]
        share = "" if stage == "lag" else f"{row['share']:8.0%}"
        print(f"  {stage:8} p50 {p50:9.1f}  p95 {p95:9.1f}{share}", file=sys.stderr)


if __name__ == "__main__":
    host.use_huge_pages()
    startup.keep_programs()
    app.run(main)
