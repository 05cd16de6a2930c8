"""Lists the shards of a source.

| source | shards |
| --- | --- |
| a folder, local or on a service that lists files | its `*.tar`, `*.parquet` or `*.jsonl` |
| a pattern: `*` on such a service; `*`, `?` or `[…]` locally | the matching files |
| a pattern with braces, `shard-{00000..00199}.tar` or `{a,b}.tar` | each expansion |
| a `.txt` file, local or remote | the sources in its lines; `#` begins a comment |
| `pipe:COMMAND` | the output of a shell command, a tar shard; with braces, several |
| anything else | one shard |

Web servers do not list files, so shards on web servers need braces or a `.txt`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from posixpath import normpath
from urllib.parse import quote, urlsplit

from .remote_access import RetryPolicy, try_request
from .remote_files import PIPE, RemoteFile, is_remote, open_filesystem

SHARD_SUFFIXES = (".tar", ".parquet", ".jsonl")
_LIST = ".txt"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILDCARD = re.compile(r"[*?\[]")  # in local patterns; in a URL, ? begins a query
_HTTP = ("http://", "https://")
# Query parameters of signed URLs: S3, Google Cloud Storage, CloudFront, and Azure (with `sig`).
_SIGNATURE = (
    r"x-amz-[^&=]*|x-goog-[^&=]*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy"
    "|token|sig"
)
_SHARED_ACCESS = "sv|ss|srt|sr|sp|se|st|sip|spr|sdd|skoid|sktid|skt|ske|sks|skv"


def list_shards(source: str | Path | Sequence[str], policy: RetryPolicy) -> list[str]:
    """List the shards of a source, or of several."""
    sources = [source] if isinstance(source, str | Path) else source
    shards = [shard for part in sources for shard in _expand(str(part), policy)]
    shown = ", ".join(map(str, sources[:3]))
    if not shards:
        raise ValueError(f"{shown}: no shards found. They must be .tar, .parquet or .jsonl files.")
    repeated = [shard for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise ValueError(f"{shown}: {repeated[0]} occurs twice. List each shard once.")
    formats = {find_format(shard) for shard in shards}
    if len(formats) > 1 or not formats <= set(SHARD_SUFFIXES):
        raise ValueError(
            f"{shown}: found {', '.join(sorted(formats))}. All shards must have one format: "
            f"{', '.join(SHARD_SUFFIXES)}."
        )
    return shards


def find_format(shard: str) -> str:
    """Return the suffix of a shard in lower case; `.tar` for the output of a command."""
    if shard.startswith(PIPE):
        return ".tar"
    path = urlsplit(shard).path if is_remote(shard) else shard
    return Path(path).suffix.lower() or "no suffix"


def find_base(shards: Sequence[str]) -> str:
    """Return the longest common prefix of all shards that ends with a slash."""
    base = shards[0][: shards[0].rfind("/") + 1]
    while not all(shard.startswith(base) for shard in shards):
        base = base[: base.rstrip("/").rfind("/") + 1]
    return base


def name_beside(url: str, path: str) -> str:
    """Return the location of a file, given its path relative to the folder of `url`.

    In a URL, `..` is resolved, because URLs have no symbolic links. A local path stays as written,
    as in a record table.
    """
    if not is_remote(url):
        return str(Path(url).parent / path)  # an absolute path stays
    path = normpath(path)
    if not url.startswith(_HTTP):
        return url[: url.rfind("/") + 1] + path
    bare = url.partition("#")[0].partition("?")[0]
    return bare[: bare.rfind("/") + 1] + quote(path)


def name_shards(shards: Sequence[str]) -> list[str]:
    """Return short names of shards: their paths below the common folder."""
    # Without queries: they may contain slashes, and their signatures change.
    bare = [shard.partition("?")[0] if is_remote(shard) else shard for shard in shards]
    if len(set(bare)) < len(bare):
        bare = drop_signatures(shards)
    base = find_base(bare) if len(bare) > 1 else ""
    base = base or bare[0][: bare[0].rfind("/") + 1]
    return [shard.removeprefix(base) for shard in bare]


def drop_signature(url: str) -> str:
    """Drop the query parameters of a URL that only grant temporary access."""
    if not url.startswith(_HTTP):
        return url
    names = _SIGNATURE
    if re.search("[?&]sig=", url, re.IGNORECASE):
        names += f"|{_SHARED_ACCESS}"
    return re.sub(f"(?<=[?&])(?:{names})(?:=[^&]*)?(?:&|$)", "", url, flags=re.I).rstrip("?&")


def drop_signatures(urls: Sequence[str]) -> list[str]:
    """Return URLs without signatures, or unchanged if two URLs would become equal."""
    bare = [drop_signature(url) for url in urls]
    return bare if len(set(bare)) == len(bare) else list(urls)


def expand_braces(text: str) -> Iterator[str]:
    """Expand the braces of a pattern, `{00..12}` and `{a,b}`, as a shell does."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        width = max(map(len, numbers.groups())) if "0" in (numbers[1][0], numbers[2][0]) else 0
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        for rest in expand_braces(text[match.end() :]):
            yield f"{text[: match.start()]}{choice}{rest}"


def names_shards(source: str) -> bool:
    """Return whether a local source is a list of shards, or a pattern with braces."""
    return find_format(source) == _LIST or bool(
        _BRACES.search(source) and not Path(source).exists()
    )


def has_remote_shards(source: str) -> bool:
    """Return whether a source, or a shard in a local list, is remote."""
    if is_remote(source) or find_format(source) != _LIST or not Path(source).is_file():
        return is_remote(source)
    return any(is_remote(line) for line in _read_lines(source, RetryPolicy()))


def find_local_files(pattern: str) -> tuple[Path, list[Path]]:
    """Return the folder before a pattern's wildcards, and the local files that match."""
    base, rest = _split_pattern(pattern)
    if _WILDCARD.search(rest) is None:
        return base, []
    return base, sorted(file for file in base.glob(rest) if not file.is_dir())


def _split_pattern(pattern: str) -> tuple[Path, str]:
    """Split a pattern after its existing folder, whose name may contain x[1] or {v1} literally."""
    parts = Path(pattern).parts
    depth = next((n for n in range(1, len(parts)) if not Path(*parts[:n]).is_dir()), len(parts)) - 1
    return Path(*parts[:depth]), "/".join(parts[depth:])


def _expand(source: str, policy: RetryPolicy) -> list[str]:
    shards = []
    for shard in _spell(source):
        if shard.startswith(PIPE):
            shards.append(shard)
        elif find_format(shard) == _LIST:
            lines = _read_lines(shard, policy)
            shards += [shard for line in lines for shard in _expand(line, policy)]
        elif is_remote(shard):
            shards += _list_remote(shard, policy)
        else:
            shards += _list_local(shard)
    return shards


def _spell(source: str) -> Iterator[str]:
    """Expand the braces of a source, except in the names of existing local files and folders."""
    if is_remote(source) or Path(source).exists():
        return expand_braces(source) if is_remote(source) else iter([source])
    base, pattern = _split_pattern(source)
    return (str(base / spelled) for spelled in expand_braces(pattern))


def _read_lines(file: str, policy: RetryPolicy) -> list[str]:
    with RemoteFile(file, policy, is_first=True).open_stream() as opened:
        lines = opened.read().decode("utf-8-sig").splitlines()
    return [shard for line in lines if (shard := line.partition("#")[0].strip())]


def _list_local(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        return _choose_format(source, sorted(file.as_posix() for file in path.iterdir()))
    if path.is_file():
        return [source]
    _, files = find_local_files(source)
    if not files:
        raise ValueError(f"{source}: no such folder or file. Correct the path.")
    return [file.as_posix() for file in files]


def _list_remote(source: str, policy: RetryPolicy) -> list[str]:
    is_pattern = "*" in source
    if not is_pattern and find_format(source) in SHARD_SUFFIXES:
        return [source]
    if source.startswith(_HTTP):
        raise ValueError(
            f"{source}: web servers do not list files. Use braces, as in "
            "https://host/{00000..00199}.tar, or list the shards in a .txt file, one per line."
        )

    def find() -> list[str]:
        filesystem, path = open_filesystem(source)
        filesystem.invalidate_cache()
        names = filesystem.glob(path) if is_pattern else filesystem.ls(path, detail=False)
        return sorted(filesystem.unstrip_protocol(name) for name in names)

    names: list[str] = try_request(source, find, policy, is_first=True)
    return names if is_pattern else _choose_format(source, names)


def _choose_format(folder: str, names: Sequence[str]) -> list[str]:
    """Return the shards of a folder, without the Parquet files of img2dataset's download notes."""
    by_suffix = {
        suffix: files
        for suffix in SHARD_SUFFIXES
        if (files := [name for name in names if name.lower().endswith(suffix)])
    }
    tar, parquet, _ = (by_suffix.get(suffix, []) for suffix in SHARD_SUFFIXES)
    if are_download_notes(parquet, tar):
        by_suffix.pop(".parquet")
    if len(by_suffix) > 1:
        formats = ", ".join(f"{len(files)} {suffix}" for suffix, files in by_suffix.items())
        raise ValueError(
            f"{folder} has files of several formats: {formats}. Select one with a pattern, "
            f"such as {folder.rstrip('/')}/*{next(iter(by_suffix))}."
        )
    return next(iter(by_suffix.values()), [])


def are_download_notes(parquet: Sequence[str], tar: Sequence[str]) -> bool:
    """Return whether every Parquet file has the name of a tar, as img2dataset's notes do."""
    stems = {PurePosixPath(name).stem for name in tar}
    return bool(parquet) and all(PurePosixPath(name).stem in stems for name in parquet)
