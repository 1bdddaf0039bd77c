"""The checker of old code: what it finds in scripts and notebooks, and what it leaves alone."""

import json
import re

import pytest
from processes import ROOT, run_python

from helpers.streaming.migrate import changes, main

GUIDE = (ROOT / "docs" / "migrating.md").read_text()
IMPORT = "from pyspark.streaming.kafka import KafkaUtils\n"

# A program of 2016, which Python 3 can't parse.
PROGRAM = '''\
"""Count words: print the number of words; metadata.broker.list is the first argument."""
from __future__ import division
import sys
from pyspark import SparkContext, SQLContext
from pyspark.streaming import StreamingContext
from pyspark.streaming.kafka import KafkaUtils

sc = SparkContext(appName="words")
ssc = StreamingContext(sc, 1)
zk, topic = sys.argv[1:]
stream = KafkaUtils.createStream(ssc, zk, "words", {topic: 1},
                                 {"auto.offset.reset": "smallest"})  # not largest
stream.map(lambda (k, v): v).count().pprint()

def save(rdd):
    print >> sys.stderr, "saving"
    rows = SQLContext(sc).createDataFrame(rdd)
\trows.registerTempTable("words")
    for number in xrange(10L):
        print "%d words" % number, `topic`

stream.foreachRDD(save)
ssc.start()
ssc.awaitTermination()
'''

ADVICE = """\
4: SQLContext -> get_spark (from helpers.spark)
6: from pyspark.streaming.kafka import KafkaUtils -> from helpers.streaming import KafkaUtils
8: SparkContext(...) -> get_spark(config={...}).sparkContext
9: StreamingContext(...) -> the same, or new_streaming_context(spark, seconds)
11: createStream(ssc, zk, ...) -> createStream(ssc, brokers, ...)
12: "smallest" -> "earliest"
13: lambda (k, v): -> lambda pair:
16: print >> sys.stderr, "saving" -> print("saving", file=sys.stderr)
17: SQLContext(...) -> the same, or get_spark()
18: .registerTempTable(...) -> .createOrReplaceTempView(...)
19: 10L -> 10
19: xrange -> range
20: `topic` -> str(topic)
20: print "%d words" % number, `topic` -> print("%d words" % number, `topic`)
22: foreachRDD(...) -> the same, or foreachBatch(...)
23: ssc.start() -> the same, or run_stream(ssc, ...)
""".splitlines()


def advice(*cells):
    """Return the advice on a program, without places and reasons."""
    return [re.sub(r" \([^()]*(\([^()]*\))?[^()]*\)$", "", text) for *_, text in changes(cells)]


def notebook(*cells):
    """Return a notebook with these cells of code, each after a cell of text."""
    text = {"cell_type": "markdown", "source": ["print 'no'"]}
    code = [
        {"cell_type": "code", "source": cell.splitlines(keepends=True), "outputs": []}
        for cell in cells
    ]
    return json.dumps({"nbformat": 4, "cells": [part for each in code for part in (text, each)]})


def test_a_program_in_python_2_is_read_line_by_line(tmp_path, capsys):
    """Each line has the place, the old code and what to write; the status is 1."""
    file = tmp_path / "words.py"
    file.write_text(PROGRAM)
    assert main([str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ADVICE)
    for line, expected in zip(lines, ADVICE, strict=True):
        assert line.startswith(f"{file}:{expected}")


def test_a_notebook_is_read_by_its_cells_of_code(tmp_path, capsys):
    """Places count cells of code, as Jupyter does; magics, also of a whole cell, are read over."""
    file = tmp_path / "words.ipynb"
    file.write_text(notebook(
        "%matplotlib inline\n!spark-submit --packages org:spark-streaming-kafka-0-8_2.11:2.0 (.py",
        "%%bash\nprint it ((",
        "%%time\nx = 1\nprint x",
    ))  # fmt: skip
    assert main([str(file)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    package = "--packages org:spark-streaming-kafka-0-8_2.11:2.0"
    assert first.startswith(f"{file}:cell 1, line 2: {package} -> leave it out")
    assert second == f"{file}:cell 3, line 3: print x -> print(x)"


def test_a_notebook_of_the_format_before_2015_is_read(tmp_path, capsys):
    """There, sheets hold the cells, and a cell's code is its input."""
    file = tmp_path / "old.ipynb"
    cells = [{"cell_type": "code", "input": ["print 'ready'"]}]
    file.write_text(json.dumps({"nbformat": 3, "worksheets": [{"cells": cells}]}))
    assert main([str(file)]) == 1
    assert capsys.readouterr().out == f'{file}:cell 1, line 1: print "ready" -> print("ready")\n'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import pyspark.streaming.kafka as k", "pyspark.streaming.kafka -> helpers.streaming"),
        ('x = {"zookeeper.connect": zk}', '"zookeeper.connect" -> leave it out'),
        ("x = {'auto.commit.enable': 1}", '"auto.commit.enable" -> "enable.auto.commit"'),
        ("zk = 'a:2181,b:2181/kafka'",
         '"a:2181,b:2181/kafka" -> for a stream, the brokers\' addresses'),
        ("x = 'kafka.serializer.StringDecoder'", "kafka.serializer.StringDecoder -> leave it out"),
        ("conf.set('spark.master', 'yarn-client')", '"yarn-client" -> "yarn"'),
        ("sqlContext.createDataFrame(rdd)", "sqlContext.createDataFrame -> spark.createDataFrame"),
        ("x = HiveContext(sc)", 'HiveContext(...) -> the same, or get_spark(config={"spark.sql.'
         'catalogImplementation": "hive"})'),
        ("model.predict_classes(x)", ".predict_classes(...) -> .predict(...).argmax(axis=1)"),
        ("from keras.layers.core import Dense", "from keras.layers.core import -> "
         "from keras.layers import"),
        ("model.fit(x, nb_epoch=3)", "nb_epoch -> epochs"),
        ("Dense(9, input_shape=(3,), init='normal')", "init -> kernel_initializer"),
        ("Dense(output_dim=9)", "output_dim -> units"),
        ("from distkeras.predictors import *", "from distkeras.predictors import * -> "
         "from helpers.transformers import ModelPredictor"),
        ("trainer = ADAG(model)", "ADAG(...) -> AveragingTrainer(...)"),
        ("producer.send('t', json.dumps(x))", "json.dumps(x) -> json.dumps(x).encode()"),
        ("import json, urlparse", "urlparse -> urllib.parse"),
        ("if x: print y,", 'print y, -> print(y, end=" ")'),
        ("print ('%d') % x", "print ('%d') % x -> print(...)".replace("'", '"')),
        ("except Exception, e:", "except Exception, e -> except Exception as e"),
        ("isinstance(x, unicode)", "unicode -> str"),
        ("from kafka import SimpleProducer, TopicPartition", "SimpleProducer -> KafkaProducer"),
        ("from kafka import TopicPartition, KafkaClient", "KafkaClient -> KafkaProducer, "
         "KafkaConsumer or KafkaAdminClient"),
        ("client = kafka.KafkaClient(host)", "kafka.KafkaClient -> KafkaProducer, KafkaConsumer or "
         "KafkaAdminClient"),
        ("producer.send_messages('t', x)", ".send_messages(...) -> .send(...)"),
        ("from kafka.common import KafkaError", "kafka.common -> kafka.errors or kafka.structs"),
        ("Producer(client, async=True)", "async -> leave it out"),
        ("producer.send('t', value=json.dumps(x.to_dict()), key=k)",
         "json.dumps(x.to_dict()) -> json.dumps(x.to_dict()).encode()"),
        ("x = '--packages a:spark-streaming-kafka-0-8_2.11:2.0,b:c_2.13:1 shell'",
         "a:spark-streaming-kafka-0-8_2.11:2.0 -> leave it out"),
        ("x = '--packages com.databricks:spark-csv_2.10:1.4.0 shell'",
         "com.databricks:spark-csv_2.10:1.4.0 -> its build for Spark 4"),
        ("sqlc.sql('select 1')", "sqlc.sql -> spark.sql"),
        ("df.select('a').map(f)", ".map(...) -> .rdd.map(...)"),
        ("model.fit_generator(g)", ".fit_generator(...) -> .fit(...)"),
        ("Model(input=x, outputs=y)", "input -> inputs"),
        ("Dense(9, W_regularizer=l2())", "W_regularizer -> kernel_regularizer"),
        ("Conv2D(32, 3, 3, activation='relu')",
         "Conv2D(32, 3, 3...) -> Conv2D(filters, (rows, columns))"),
        ("model.save_weights('a.h5')", '"a.h5" -> "....weights.h5"'),
        ("history.history['val_acc']", '"val_acc" -> "val_accuracy"'),
        ("from keras.utils import np_utils", "np_utils -> to_categorical"),
        ("y = np_utils.to_categorical(y)",
         "np_utils.to_categorical -> keras.utils.to_categorical"),
        ("AccuracyEvaluator(a)", "AccuracyEvaluator(...) -> MulticlassClassificationEvaluator("
         'predictionCol=..., labelCol=..., metricName="accuracy")'),
        ("raise E, 'bad', tb", 'raise E, "bad", tb -> raise E("bad").with_traceback(tb)'),
        ("print r'\\d'", 'print r"\\d" -> print(r"\\d")'),
        ("print ('a') + b", 'print ("a") + b -> print(...)'),
        ("x = rows.next()", "rows.next() -> next(rows)"),
        ("x = d.keys()[0]", ".keys()[ -> list(...)[...]"),
        ("x.encode('utf8').split(',')", '.encode("utf8") -> leave it out'),
        ("sum(map(lambda k, (a, b): a, x))", "lambda k, (...) -> lambda ..., pair:"),
        ("def f(x, (a, b)):", "def f(x, (a, b)...) -> a name for the pair"),
        ("exec 'x = 1'", 'exec "x = 1" -> exec("x = 1")'),
        ("os.chmod(x, 0755)", "0755 -> 0o755"),
    ],
)  # fmt: skip
def test_an_old_name_is_found(old, new):
    """One old name brings one line of advice."""
    assert advice(old) == [new]


@pytest.mark.parametrize(
    "code",
    [
        "# print 'x'; sqlContext.sql()",
        '"""print x\nzookeeper.connect"""',
        "log('zookeeper.connect to zk:2181 failed: print it', 'lambda (k, v): xrange(3)')",
        "print('%s' % x, file=log)",
        "print(x)\nprint\\\n (x)",
        "LabelIndexTransformer(output_dim=2); Embedding(9, output_dim=3); init = 1; nb_epoch = 3",
        "Dense(9, kernel_initializer=x(init=1))",
        "sort = 'smallest'",
        "lambda k, v: (k, v)",
        "from io import StringIO\nfrom queue import Queue",
        "f'{x:05d} 0777 100,000'",
        "table['unicode'].long, object.print",
        "except (TypeError, ValueError):",
        "lambda k, pair=(1, 2): k\ndef f(x, pair=(1, 2)): pass",
        "from kafka import KafkaProducer\nfrom pykafka import KafkaClient",
        "x.encode()\nproducer.send('t', x.encode())\nproducer.send('t', json.dumps(x).encode())",
        "Conv2D(32, (3, 3), 2)\ndf['acc']\nmodel.save_weights('a.weights.h5')",
        "raise ValueError('a', b)",
        "async def f(x): pass",
    ],
)
def test_what_only_looks_old_is_left_alone(code):
    """Comments, docstrings and messages bring no advice, nor do today's names."""
    assert advice(code) == []


def test_calls_that_stay_are_explained_only_beside_the_old_import():
    """Once the import is changed, what differs has been read, and is not repeated."""
    code = "stream.foreachRDD(save)\nother.foreachRDD(save)\n"
    assert advice(IMPORT, code)[1:] == ["foreachRDD(...) -> the same, or foreachBatch(...)"]
    assert advice(IMPORT.replace("pyspark.streaming.kafka", "helpers.streaming"), code) == []


def old_code(row):
    """Return the code in the first cell of a row of the guide, as cells of a notebook."""
    for span in re.findall("`([^`]+)`", row.split("|")[1]):
        if span.startswith("spark-submit"):
            yield f"run('{span}')"
        elif re.fullmatch(r"(?!distkeras)\w+(\.[\w*]+)+", span):
            yield f"settings['{span.replace('*', 'enabled')}'] = 1"
        elif span in ("smallest", "largest"):
            yield f"settings['auto.offset.reset'] = '{span}'"
        else:
            yield f"{span}(model)" if span.isupper() else span


ROWS = [
    row
    for table in re.findall(r"^\| old .*\n\|-.*\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    for row in table.splitlines()
]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_guide_is_found(row):
    """The checker knows each old call and each old setting of the guide."""
    assert {cell for cell, *_ in changes([IMPORT, *old_code(row)])} - {1}


def test_the_guide_has_all_its_rows():
    """The tables are found: the calls, the settings, and Distributed Keras."""
    assert len(ROWS) >= 15 + 10 + 4


def test_the_kits_own_programs_need_no_change():
    """The examples, and the walkthrough's section on the stream as it should be."""
    for file in (ROOT / "examples").glob("*.py"):
        assert changes([file.read_text()]) == []
    cells = json.loads((ROOT / "notebooks" / "1_walkthrough.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    (begin,) = [place for place, text in enumerate(sources) if "## The stream, as it" in text]
    code = [
        text
        for text, cell in zip(sources[begin:], cells[begin:], strict=True)
        if cell["cell_type"] == "code"
    ]
    assert len(code) > 10
    assert changes(code) == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.py", None, r"can't be read: No such file or directory\."),
        ("words.py", b"print(\xff)",
         r"can't be read: it is not a Python script in UTF-8\. Name its .+\."),
        ("words.py", b"x = 1\nprint((x)\n", r"words\.py:\d: this is not Python: .+\."),
        ("words.ipynb", b"{", r"can't be read: it is not a notebook in UTF-8\."),
        ("words.ipynb", b"[]", r"can't be read: it is not a notebook in UTF-8\."),
        ("words.ipynb", notebook("x = 1", "x = (").encode(),
         r"words\.ipynb:cell 2, line \d: this is not Python: .+\."),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path, capsys, name, content, reason
):
    """One sentence names the file, the status is 2, and the other files are read."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    good = tmp_path / "good.py"
    good.write_text("print 'ready'\n")
    assert main([str(tmp_path / name), str(good)]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}.*{reason}\n", printed.err)
    assert printed.out == f'{good}:1: print "ready" -> print("ready")\n'


def test_what_is_found_before_an_error_and_in_other_cells_is_printed(tmp_path, capsys):
    """One cell in another language, or one open bracket, does not hide the advice on the rest."""
    file = tmp_path / "words.ipynb"
    file.write_text(notebook("print 'a'", "xrange(3)\nprint(\n    urllib.quote(x)\n", "print 'b'"))
    assert main([str(file)]) == 2
    printed = capsys.readouterr()
    found = [line.removeprefix(f"{file}:") for line in printed.out.splitlines()]
    assert found == [
        'cell 1, line 1: print "a" -> print("a")',
        "cell 2, line 1: xrange -> range",
        "cell 2, line 3: urllib.quote -> urllib.parse.quote",
        'cell 3, line 1: print "b" -> print("b")',
    ]
    assert printed.err == f"{file}:cell 2, line 2: this is not Python: a bracket is not closed.\n"


def test_a_cell_that_a_magic_sends_elsewhere_is_read(tmp_path, capsys):
    """`%%writefile` and `%%spark` hold Python as well."""
    file = tmp_path / "job.ipynb"
    file.write_text(notebook("%%writefile job.py\nprint 'a'", "%%spark\nprint 'b'"))
    assert main([str(file)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_guides_command_prints_what_the_guide_says(tmp_path):
    """The guide's example is run as it stands there."""
    code, command, output = re.search(
        r"`words\.py`.*?\n\n```\n(.*?)```.*?```sh\n\.venv/bin/python (.*?)\n```.*?```\n(.*?)```",
        GUIDE, re.DOTALL,
    ).groups()  # fmt: skip
    (tmp_path / "words.py").write_text(code)
    run = run_python(*command.split(), cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (1, output, "")
