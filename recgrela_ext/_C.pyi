from typing import TypedDict

class BuildFacts(TypedDict):
    version: str
    torch_built: str
    cuda_toolkit: str | None
    cuda_archs: list[str]

def build_info() -> BuildFacts: ...
