"""Print what to change in code of 2016: ``python -m helpers.streaming.migrate FILE...``.

It reads scripts and notebooks, in Python 2 as well, and looks for names that Spark 4, Kafka 4,
Keras 3, Python 3 or `helpers.streaming` replace. `docs/migrating.md` has the reasons in full.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.streaming.settings import OLD_NAMES, OLD_RESETS, ZOOKEEPER_PORT

_MARK = "\u01c3"  # a letter, before numbers such as 10L: Python 3 can only read them as names
_START = r"(?:^|(?<=[;:])|(?<=[;:] ))"  # of a statement
_PRINT = rf'{_START}print(?: (?=["\w`[{{-])|(?=["`[{{]))'  # and not the function
_INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"  # of parentheses, with calls in them
_LAYER = rf"\b(?:Dense|LSTM|GRU|Conv\w+)\({_INSIDE}(?<=[(, ])"
_OPTIMIZER = rf"\b(?:SGD|RMSprop|Ada\w+|Nadam)\({_INSIDE}(?<=[(, ])"

# A rule is a pattern, what to write instead, and why if that is not obvious. If the pattern has a
# group `old`, only that is shown.
_CHANGES = [
    # PySpark
    (r"from pyspark\.streaming\.kafka import (.+)", r"from helpers.streaming import \1", ""),
    (r"from pyspark\.streaming import (?:.*\W)?kafka\b", "from helpers import streaming", ""),
    (r"(?<!from )\bpyspark\.streaming\.kafka\b", "helpers.streaming", ""),
    (r"^from pyspark\S* import (?:.*\W)?(?P<old>(?:SQL|Hive)Context)\b", "get_spark",
     "from helpers.spark"),
    (r"\bSQLContext(?:\.getOrCreate)?\(", "get_spark()", "a session has the same methods"),
    (r"\bHiveContext\(", 'get_spark(config={"spark.sql.catalogImplementation": "hive"})', ""),
    (r"\bsql(?:Context|Ctx)\.(createDataFrame|read|sql|table|udf)\b", r"spark.\1", ""),
    (r"\bsql(?:Context|Ctx)\.json(?:RDD|File)\(", "spark.read.json(...)", ""),
    (r"\.register(?:TempTable|DataFrameAsTable)\(", ".createOrReplaceTempView(...)", ""),
    # Keras
    (r"from keras\.layers\.\w+ import", "from keras.layers import", ""),
    (r"\b(?:keras\.utils\.)?np_utils\b", "keras.utils", ""),
    (r"\.predict_classes\(", ".predict(...).argmax(axis=1)", "for one output: predict(...) > 0.5"),
    (r"[(,] ?(?P<old>nb_epoch) ?=", "epochs", ""),
    (rf"{_LAYER}(?P<old>output_dim) ?=", "units", ""),
    (rf"{_LAYER}(?P<old>init) ?=", "kernel_initializer", ""),
    (rf"{_LAYER}(?P<old>border_mode) ?=", "padding", ""),
    (r"\bConvolution(\d)D\b", r"Conv\1D", "the size of the kernel is a tuple"),
    (rf"{_OPTIMIZER}(?P<old>lr) ?=", "learning_rate", ""),
    # Distributed Keras
    (r"(?:from )?\bdistkeras\.predictors(?: import .+)?",
     "from helpers.transformers import ModelPredictor", ""),
    (r"(?:from )?\bdistkeras\.transformers(?: import .+)?",
     "from helpers.transformers import LabelIndexTransformer",
     "pyspark.ml.feature has the others, such as OneHotEncoder and MinMaxScaler"),
    (r"(?:from )?\bdistkeras\.trainers(?: import .+)?",
     "from helpers.training import SingleTrainer, AveragingTrainer",
     "AveragingTrainer replaces the asynchronous ones"),
    (r"(?:from )?\bdistkeras\.evaluators(?: import .+)?",
     "from pyspark.ml.evaluation import MulticlassClassificationEvaluator", ""),
    (r"(?:from )?\bdistkeras\.utils(?: import .+)?",
     "from helpers.records import json_to_dataframe_row",
     "nothing replaces the other functions"),
    (r"\b(?:ADAG|DOWNPOUR|AEASGD|EAMSGD|DynSGD)\(", "AveragingTrainer(...)",
     "arguments after the loss by name"),
    # Settings
    *[(f'"{re.escape(old)}"', f'"{new}"' if new else "leave it out",
       "the old name also works" if new else "it has no effect") for old, new in OLD_NAMES.items()],
    *[(rf'auto[._]offset[._]reset"?\]? ?[:=,] ?(?P<old>"{old}")', f'"{new}"',
       "the old value also works") for old, new in OLD_RESETS.items()],
    (rf'"[\w.,:-]*:{ZOOKEEPER_PORT}(?:[,/][^" ]*)?"', "for a stream, the brokers' addresses",
     "such as host:9092; Kafka 4 has no ZooKeeper"),
    (r'(?:--(?:packages|jars) )?[^\s",]*spark-streaming-kafka[^\s",]*', "leave it out",
     "the stream fetches the connector for the running Spark"),
    (r'\bkafka\.serializer\.\w+coder\b|"serializer\.class"', "leave it out",
     "keyDecoder and valueDecoder decode"),
    (r'"spark\.streaming\.concurrentJobs"', "leave it out", "above 1 it is an error"),
    (r'"yarn-(client|cluster)"', r'"yarn"', r'and "spark.submit.deployMode": "\1"'),
    # kafka-python
    (r"^from kafka\S* import (?:.*\W)?(?P<old>Simple\w+|KafkaClient)\b",
     "KafkaProducer, KafkaConsumer or KafkaAdminClient", "kafka-python dropped the others"),
    (r"\.send\([^()]*, ?(?P<old>json\.dumps\([^()]*\))\)", r"\1.encode()", "Kafka takes bytes"),
    # Python 2
    (rf"{_START}print ?>> ?([\w.]+), ?([^;]+)", r"print(\2, file=\1)", ""),
    (rf"{_PRINT}([^;]*[^;, ])(?=;|$)", r"print(\1)", ""),
    (rf"{_PRINT}([^;]+),(?=;|$)", r'print(\1, end=" ")', ""),
    (rf"{_START}print(?=;|$)", "print()", ""),
    (rf"{_START}print ?\({_INSIDE}\) ?[%,][^;]*", "print(...)", "all of it in parentheses"),
    (r"\blambda ?\([^:]*\) ?:", "lambda pair:", "with pair[0] and pair[1] for the names"),
    (r"^except ([\w.]+|\([^()]*\)), ?(\w+)", r"except \1 as \2", ""),
    (r"^raise ([\w.]+), ?(.+)", r"raise \1(\2)", ""),
    (r"`([^`]+)`", r"str(\1)", ""),
    (r"<>", "!=", ""),
    (rf"\b{_MARK}(\w+)[lL]\b", r"\1", ""),
    (rf"\b{_MARK}0([0-7]+)\b", r"0o\1", ""),
    (r"\.iter(items|keys|values)\(\)", r".\1()", ""),
    (r"\.has_key\(", "in", ""),
    (r"(?<![\w.])(?:unicode|basestring)(?= ?[(),])", "str", ""),
    (r"(?<![\w.])reload\(sys\)|\bsys\.setdefaultencoding\(", "leave it out", "text is Unicode"),
    (r"\burllib\.((?:un)?quote(?:_plus)?|urlencode)\b", r"urllib.parse.\1", ""),
    *[(rf"(?<![\w.]){old}(?= ?\()", new, "") for old, new in {
        "xrange": "range", "long": "int", "raw_input": "input", "unichr": "chr"}.items()],
    *[(rf"(?:^(?:import (?:.*[ ,])?|from )|(?<![\w.])(?=\w+\.))(?P<old>{old})\b", new, "")
      for old, new in {
        "urlparse": "urllib.parse", "urllib2": "urllib.request", "cPickle": "pickle",
        "StringIO": "io", "ConfigParser": "configparser", "Queue": "queue"}.items()],
]  # fmt: skip

# Differences in the calls of a stream, for files that import the old module. Where a rule says
# 'the same', the call stays as it is, and the file's first one is enough.
_STREAM_CHANGES = [
    (r"\bSparkContext\(", "get_spark(config={...}).sparkContext",
     "from helpers.spark; or the same, with PYSPARK_PYTHON set to this Python"),
    (r"\bStreamingContext\(", "the same, or new_streaming_context(spark, seconds)", ""),
    (r"\bcreateStream\((?:[^(),]*,){0,2}", "createStream(ssc, brokers, ...)",
     "no ZooKeeper; threads and storageLevel have no effect; to Kafka, the group is new"),
    (r"\bcreateDirectStream\(", "the same", "with a group.id, offsets are committed"),
    (r"\bTopicAndPartition\(|\bfromOffsets ?=", "the same", "also if the group has other offsets"),
    (r"\bOffsetRange\(|\b(?:messageHandler|keyDecoder|valueDecoder) ?=", "the same", ""),
    (r"\._raw(?:Message|Key)\b", ".message or .key", "as the decoders return them"),
    (r"\bcreateRDD\(|\bleaders ?=", "the same", "leaders has no effect"),
    (r"\bKafkaRDD\(", "leave it out", "the RDD of foreachRDD and transform has offsetRanges()"),
    (r"\boffsetRanges\(\)", "the same",
     "sorted, without partitions that have no new records; a group.id or a sink saves them"),
    (r"\bKazooClient\(", "a group.id, with commitAsync or without, or a sink", "to save offsets"),
    (r"\bforeachRDD\(", "the same, or foreachBatch(...)", "the stream stops if it fails"),
    (r"\.checkpoint\(|\bStreamingContext\.getOrCreate\(", "the same, with a new folder",
     "Spark can't read another version's checkpoint"),
    (r"\bssc\.start\(\)|\.awaitTermination(?:OrTimeout)?\(\)?", "the same, or run_stream(ssc, ...)",
     "an error if a batch failed"),
    (r"\bssc\.stop\(\)?", "the same, or stop_streaming(ssc, gracefully=True)", ""),
    (r"\bRow\((?:\*\*|\w+ ?=(?!=))", "the same, with the columns in the schema's order",
     "Spark 3 stopped sorting them by name"),
    (r'"group\.id"', "the same", "the stream begins at the group's offsets, and commits"),
    (r'"enable\.auto\.commit"', "the same", "if false, only commitAsync commits"),
    (r'"spark\.streaming\.(?:kafka\.m\w+RatePerPartition|backpressure\.\w+)"', "the same", ""),
    (r'"(?:auto\.commit\.interval\.ms|(?:key|value)\.deserializer)"|'
     r'"spark\.streaming\.(?:receiver\.[\w.]+|blockInterval|kafka\.maxRetries)"',
     "leave it out", "it has no effect"),
]  # fmt: skip
_OLD_MODULE = re.compile(r"\bpyspark\.streaming(?:\.| import (?:.*\W)?)kafka\b")

_OLD_NUMBER = re.compile(r"(?<![\w.-])(?=(?:0[xX][\da-fA-F]+|\d+)[lL]\b|0[0-7])")
_MAGIC = re.compile(r"\s*(?:!|%{1,2}[a-z])")
_OTHER_CELL = re.compile(r"\s*%%(?!time|capture|prun)")  # a shell's, or HTML
_STRING = re.compile(r"""\w*('{3}|"{3}|['"])(.*)\1""", re.DOTALL)
_F_STRING = getattr(tokenize, "FSTRING_MIDDLE", None)  # since Python 3.12
# Strings that the rules see; in others, such as messages, a name means nothing.
_SETTING = re.compile(r"[\w.,:/-]*|.*spark-streaming-kafka.*")
_ONLY_STRINGS = re.compile(r'(?: ?"[^"]*")*')


class _Statement(NamedTuple):
    """A statement in one line: its text, the same with blanks for strings, and lines' numbers."""

    text: str
    code: str
    lines: list[int]


def changes(cells: Sequence[str]) -> list[tuple[int, int, str]]:
    r"""Return what to change in a program: the cell and the line, counted from 1, and advice.

    Parameters
    ----------
    cells : sequence of str
        The code of a notebook's cells; that of a script is the only one.

    Raises
    ------
    tokenize.TokenError
        If a cell isn't Python, with the reason, and the cell and the line.

    Examples
    --------
    >>> changes(["kafkaParams = {'metadata.broker.list': broker}", "# Python 2\nprint 'ready'"])
    [(1, 1, '"metadata.broker.list" -> "bootstrap.servers" (the old name also works)'),
     (2, 2, 'print "ready" -> print("ready")')]
    """
    statements: list[tuple[int, _Statement]] = []
    for number, cell in enumerate(cells, 1):
        try:
            statements += [(number, statement) for statement in _parse(cell)]
        except tokenize.TokenError as error:
            reason, (line, _) = error.args
            raise tokenize.TokenError(reason, (number, line)) from None
    is_old = any(_OLD_MODULE.search(statement.code) for _, statement in statements)
    found = set()
    for pattern, new, why in [*_CHANGES, *(_STREAM_CHANGES if is_old else ())]:
        places = {
            (number, lines[match.start(_old(match))], _advice(match, text, new, why))
            for number, (text, code, lines) in statements
            for match in re.finditer(pattern, code)
        }
        found |= {min(places)} if places and new.startswith("the same") else places
    return sorted(found)


def _old(match: re.Match) -> str | int:
    """Return the group of a match that is shown."""
    return "old" if "old" in match.re.groupindex else 0


def _advice(match: re.Match, text: str, new: str, why: str) -> str:
    """Return the old code, what to write instead, and why."""
    old = text[slice(*match.span(_old(match)))].strip()
    if old.count("(") > old.count(")"):
        old += " ...)" if old.endswith(",") else "...)"
    advice = f"{old} -> {new} ({why})" if why else f"{old} -> {new}"
    advice = re.sub(r"\\(\d)", lambda group: text[slice(*match.span(int(group[1])))], advice)
    return advice.replace(_MARK, "")


def _parse(source: str) -> Iterator[_Statement]:
    """Yield the statements of a cell, without comments, docstrings and indentation."""
    lines = "\n".join(line.lstrip() for line in source.split("\n"))
    text, code, numbers, end = "", "", [], None
    for token in tokenize.generate_tokens(io.StringIO(_OLD_NUMBER.sub(_MARK, lines)).readline):
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if not _ONLY_STRINGS.fullmatch(code):
                yield _Statement(text, code, numbers)
            text, code, numbers = "", "", []
        elif token.type != tokenize.COMMENT and token.string.strip():
            piece, blank = _strings(token)
            if token.start != end and text and text[-1] not in "([{." and piece[0] not in ")]}.,:":
                piece, blank = f" {piece}", f" {blank}"
            text, code = text + piece, code + blank
            numbers += [token.start[0]] * len(piece)
            end = token.end


def _strings(token: tokenize.TokenInfo) -> tuple[str, str]:
    """Return a token's text, and the same with blanks for a string unless it may be a setting."""
    quoted = _STRING.fullmatch(token.string)
    if token.type not in (tokenize.STRING, _F_STRING):
        return token.string, token.string
    quote, inner = ('"', quoted[2]) if quoted else ("", token.string)
    text = re.sub(r"\s", " ", inner.replace(_MARK, "")).replace('"', "'")
    blank = text if _SETTING.fullmatch(text) else "\0" * len(text)
    return f"{quote}{text}{quote}", f"{quote}{blank}{quote}"


def _read(file: str) -> list[str]:
    """Return the code of a notebook's cells, or that of a script as a single cell."""
    if not file.endswith(".ipynb"):
        with tokenize.open(file) as script:
            return [script.read()]
    notebook = json.loads(Path(file).read_text(encoding="utf-8"))
    try:
        sheets = notebook.get("worksheets", [notebook])  # until 2015
        cells = [cell for sheet in sheets for cell in sheet["cells"] if cell["cell_type"] == "code"]
        return [_without_magics("".join(cell.get("source", cell.get("input")))) for cell in cells]
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("not a notebook") from error


def _without_magics(source: str) -> str:
    """Return a cell with its shell commands and other magics as strings."""
    is_other = _OTHER_CELL.match(source)
    return "\n".join(
        f"_({json.dumps(line)})" if is_other or _MAGIC.match(line) else line
        for line in source.split("\n")
    )


def _place(file: str, cell: int, line: int) -> str:
    """Return where something is: a notebook's code cells are counted, as Jupyter does."""
    return f"{file}:cell {cell}, line {line}" if file.endswith(".ipynb") else f"{file}:{line}"


def main(arguments: list[str] | None = None) -> int:
    """Print what to change; return 1 if there is something, and 2 if a file can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.streaming.migrate",
        description="Print what to change in code that uses pyspark.streaming.kafka, line by line.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a Python script or a notebook")
    return max(_report(file) for file in parser.parse_args(arguments).files)


def _report(file: str) -> int:
    """Print what to change in a file; return 0, 1 or 2, as `main` does."""
    try:
        found = changes(_read(file))
    except tokenize.TokenError as error:
        reason, place = error.args
        print(f"{_place(file, *place)}: this is not Python: {reason}.", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{file} can't be read: {error.strerror}.", file=sys.stderr)
        return 2
    except (ValueError, SyntaxError):
        kind = "notebook" if file.endswith(".ipynb") else "Python script"
        print(f"{file} can't be read: it is not a {kind} in UTF-8.", file=sys.stderr)
        return 2
    for cell, line, advice in found:
        print(f"{_place(file, cell, line)}: {advice}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
