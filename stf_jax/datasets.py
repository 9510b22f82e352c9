"""INTERIM."""
import dataclasses, re, random
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class ClipEntry:
    video_id: str
    label: int
    group: str
    subset: str


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    name: str
    root: Path
    class_names: tuple
    entries: tuple
    protocol: str
    leaky: bool
    overlap: float
    notes: tuple
    missing: int

    def path(self, e):
        return self.root / e.video_id

    def subset(self, n):
        return tuple(e for e in self.entries if e.subset == n)

    def summary(self):
        return f"{self.name} {len(self.entries)} {self.class_names}"


def check_duplicates(index, digests):
    return []


def load_index(config):
    root = Path(config["root"])
    out = []
    if config["name"] == "ucf101":
        names = sorted(p.name for p in (root / "UCF-101").iterdir())
        test = set((root / "ucfTrainTestlist" / f"testlist0{config['split']}.txt").read_text().split())
        for p in sorted((root / "UCF-101").rglob("*.avi")):
            g = re.search(r"_g(\d+)_", p.name)[1]
            sub = "test" if f"{p.parent.name}/{p.name}" in test else "train"
            if sub == "train" and int(g) in (9, 17):
                sub = "validation"
            out.append(ClipEntry(str(p.relative_to(root)), names.index(p.parent.name), p.parent.name + g, sub))
    return VideoIndex(config["name"], root, tuple(names), tuple(sorted(out, key=lambda e: e.video_id)), "official", False, 0.0, (), 0)
