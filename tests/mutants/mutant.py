"""What a mutant is: one rule of the claim protocol, broken by one small change of one file of the service."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mutant:
    """`rule` is what `file` (in service/) guarantees while it holds `old`; `red` is the test that misses it."""

    name: str
    rule: str
    file: str
    old: str
    new: str
    red: str

    def __post_init__(self) -> None:
        assert self.old != self.new, self.name

    @property
    def node_id(self) -> str:
        """The test as pytest calls it."""
        return f"tests/{self.red}"

    def applied(self, repository: Path) -> str:
        """The file's text with the rule broken; it must say `old` exactly once."""
        text = (repository / "service" / "firstclaim" / self.file).read_text()
        found = text.count(self.old)
        assert found == 1, (
            f"the mutant {self.name} no longer fits: service/{self.file} has its text {found} times instead of once; "
            f"look where the rule lives now ({self.rule}) and break it there:\n{self.old}"
        )
        return text.replace(self.old, self.new)
