"""What an item says about itself → hashed features: the one function of trainer and worker.

Knows no vectors and no catalogue. Words are runs of Han characters cut by jieba's dictionary, and
runs of other letters and digits; NFKC, lower case, without stop words. Features are the words, each
two neighbours, the categories and the domain, hashed into a number of buckets: no vocabulary has to
be agreed on, and a word that training never met meets a bucket all the same.

Same text, same features, on every machine and in every process: a golden file holds it. Change
nothing here without a new `TEXT_VERSION`.
"""

import itertools
import re
import unicodedata
import warnings
import zlib
from functools import lru_cache
from typing import Any, Protocol

from afterclick.serving.errors import ConfigError

TEXT_VERSION = 1
"""Version of this function; a release names the one that it was trained with."""

FIELD_CHARS_MAX = 2000
"""Longer fields are read so far: about a millisecond, and a story says in its beginning what it is
about.
"""

_RUN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]+|[^\W_\u3400-\u4dbf\u4e00-\u9fff]+")

_STOP = """
a an and are as at be been but by can do does for from had has have he her his how if in into is it
its me my no nor not of off on or our out over she so than that the their them then there these they
this those to too under up us was we were what when where which who whom why will with would you
your s t
的 了 和 与 及 或 在 是 也 就 都 而 之 其 于 对 把 被 将 从 向 到 以 为 因 由
让 给 等 并 但 且 则 却 又 再 还 很 更 最 不 没 没有 有 这 那 这个 那个 这些 那些
此 该 各 每 某 个 们 我 你 他 她 它 我们 你们 他们 什么 怎么 如何 为何 为什么
吗 呢 吧 啊 着 过 得 地 所 能 会 可 可以 应 已 已经 正 正在 称 说
"""
STOP_WORDS = frozenset(_STOP.split())
"""English and Chinese words that say nothing of a subject."""


class Described(Protocol):
    """What an item may say of itself (streams.events.Item and manifest.ItemRow have it)."""

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def categories(self) -> list[str]: ...  # noqa: D102
    @property
    def domain(self) -> str: ...  # noqa: D102


def words(text: str) -> list[str]:
    """Words of a text in order, stop words left out.

    Raises:
        ConfigError: the text has Han characters, and jieba is not installed.
    """
    plain = unicodedata.normalize("NFKC", text[:FIELD_CHARS_MAX]).lower()
    found: list[str] = []
    for run in _RUN.findall(plain):
        is_han = "\u3400" <= run[0] <= "\u9fff"
        found += _cutter().lcut(run) if is_han else [run]
    return [word for word in found if word not in STOP_WORDS]


def features(item: Described) -> list[list[str]]:
    """Features of title, text, categories and domain, each field a list of its own.

    A field weighs the same however long it is, so that a story does not drown its title.
    """
    return [
        _grams(words(item.title)),
        _grams(words(item.text)),
        [f"c\0{name}" for name in sorted(set(item.categories))],
        [f"d\0{item.domain}"] if item.domain else [],
    ]


def bucket(feature: str, num_buckets: int) -> int:
    """Bucket of a feature."""
    return zlib.crc32(feature.encode("utf-8", "surrogatepass")) % num_buckets


def warm() -> None:
    """Load the dictionary now, about a second, once per process, and not at the first item."""
    _cutter()


def _grams(found: list[str]) -> list[str]:
    pairs = itertools.pairwise(found)
    return [f"w\0{word}" for word in found] + [f"w\0{left}\0{right}" for left, right in pairs]


@lru_cache(maxsize=1)
def _cutter() -> Any:
    """A tokenizer of our own: nobody's user dictionary, and no cache in a shared folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source has unescaped backslashes
        try:
            import jieba
        except ImportError as error:
            raise ConfigError(
                "text: Chinese text needs jieba; install it with: pip install 'afterclick[worker]'"
            ) from error
    cutter = jieba.Tokenizer()
    # `initialize` would read a cache from the temporary folder, where anybody may put one.
    with cutter.get_dict_file() as dictionary:
        cutter.FREQ, cutter.total = cutter.gen_pfdict(dictionary)
    cutter.initialized = True
    return cutter
