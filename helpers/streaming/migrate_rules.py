"""The rules of `helpers.streaming.migrate`: what replaces the names of 2016, and why."""

from __future__ import annotations

import re

from helpers.streaming.settings import OLD_NAMES, OLD_RESETS, ZOOKEEPER_PORT

MARK = "\u01c3"  # a letter, before numbers such as 10L: Python 3 can only read them as names
_START = r"(?:^|(?<=[;:])|(?<=[;:] ))"  # of a statement
_PRINT = rf'{_START}print(?: (?=["\w`[{{-])|(?=["`[{{]))'  # and not the function
_INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"  # of parentheses, with calls in them
_LAYER = rf"\b(?:Dense|SimpleRNN|LSTM|GRU|Conv\w+|\w+Pooling\dD)\({_INSIDE}(?<=[(, ])"
_OPTIMIZER = rf"\b(?:SGD|RMSprop|Ada\w+|Nadam)\({_INSIDE}(?<=[(, ])"

# A rule is a pattern, what to write instead, and why if that is not obvious. If the pattern has a
# group `old`, only that is shown.
CHANGES = [
    # PySpark
    (r"from pyspark\.streaming\.kafka import (.+)", r"from helpers.streaming import \1", ""),
    (r"from pyspark\.streaming import (?:.*\W)?kafka\b", "from helpers import streaming", ""),
    (r"(?<!from )\bpyspark\.streaming\.kafka\b", "helpers.streaming", ""),
    (r"^from pyspark\S* import (?:.*\W)?(?P<old>(?:SQL|Hive)Context)\b", "get_spark",
     "from helpers.spark"),
    (r"\bSQLContext(?:\.getOrCreate)?\(", "the same, or get_spark()", "it is deprecated"),
    (r"\bHiveContext\(",
     'the same, or get_spark(config={"spark.sql.catalogImplementation": "hive"})',
     "it is deprecated"),
    (r"\b(?:sql|hive)_?(?:[Cc]ontext|[Cc]tx|c)\.(createDataFrame|read|sql|table|udf)\b",
     r"spark.\1", ""),
    (r"\.json(?:RDD|File)\(", ".read.json(...)", ""),
    (r"\.parquetFile\(", ".read.parquet(...)", ""),
    (r"\.(?:infer|apply)Schema\((?! ?\))", ".createDataFrame(...)", ""),
    (r"\.saveAsParquetFile\(", ".write.parquet(...)", ""),
    (r"\.registerTempTable\(", ".createOrReplaceTempView(...)", ""),
    (rf"\.(?:select|sql|table)\({_INSIDE}\)(?P<old>\.(map|flatMap|mapPartitions)\()",
     r".rdd.\2(...)", "a DataFrame isn't an RDD"),
    (r"\bfrom pyspark\.mllib\.(linalg|feature) import\b", r"from pyspark.ml.\1 import",
     "if stages of pyspark.ml take the vectors"),
    # Keras
    (r"from keras\.layers\.\w+ import", "from keras.layers import", ""),
    (r"from keras\.utils(?:\.np_utils)? import (?:.*\W)?(?P<old>np_utils)\b", "to_categorical", ""),
    (r"\b(?:keras\.utils\.)?np_utils\.(\w+)", r"keras.utils.\1", ""),
    (r"from keras\.utils\.\w+_utils import", "from keras.utils import", ""),
    (r"\.predict_classes\(", ".predict(...).argmax(axis=1)", "for one output: predict(...) > 0.5"),
    (r"\.(fit|evaluate|predict)_generator\(", r".\1(...)", ""),
    (r"\bmodel_from_(?:json|yaml)\(", "the code that builds the model",
     "Keras 3 reads no other version's; then load_weights"),
    (r'\.save_weights\(f?(?P<old>"[^"]*(?<!\.weights)\.(?:h5|hdf5)")', '"....weights.h5"', ""),
    (r'\bModelCheckpoint\((?:filepath ?= ?)?(?P<old>"[^"]*(?<!\.weights)\.(?:h5|hdf5)")',
     '"....keras"', "or .weights.h5, with save_weights_only"),
    (r'\b(?:history\[|monitor ?= ?)(?P<old>"(val_)?acc")', r'"\2accuracy"',
     "if compiled with accuracy"),
    (r"\bTimeDistributedDense\(", "TimeDistributed(Dense(...))", ""),
    (r"\b[Mm]erge\(\[", "Concatenate, Add or Multiply", "by the old mode"),
    (r"\bConvolution(\d)D\b", r"Conv\1D", "the size of the kernel is a tuple"),
    (r"\bConv2D\([^,()]+, ?\d+, ?\d+", "Conv2D(filters, (rows, columns))",
     "the third argument is the strides"),
    (r"\b(?:set_)?image_dim_ordering\(", "image_data_format", "channels_last or channels_first"),
    *[(rf"[(,] ?(?P<old>{old}) ?=(?!=)", new, why) for old, new, why in [
        ("nb_epoch", "epochs", ""), ("samples_per_epoch", "steps_per_epoch", "counts batches"),
        ("nb_val_samples", "validation_steps", "counts batches"),
        ("show_accuracy|class_mode", "leave it out", 'metrics=["accuracy"] in compile'),
        ("nb_worker|pickle_safe|write_grads", "leave it out", ""),
        ("nb_filter", "filters", ""), ("filter_length", "kernel_size", ""),
        ("pool_length", "pool_size", ""), ("dim_ordering", "data_format", ""),
        ("W_regularizer", "kernel_regularizer", ""), ("b_regularizer", "bias_regularizer", ""),
        ("inner_init", "recurrent_initializer", ""),
        ("inner_activation", "recurrent_activation", ""), ("dropout_W", "dropout", ""),
        ("dropout_U", "recurrent_dropout", ""), ("batch_input_shape", "batch_shape", "of an Input"),
    ]],
    *[(rf"{_LAYER}(?P<old>{old}) ?=", new, "") for old, new in {
        "output_dim": "units", "init": "kernel_initializer", "bias": "use_bias",
        "border_mode": "padding", "subsample": "strides"}.items()],
    *[(rf"\bModel\({_INSIDE}(?<=[(, ])(?P<old>{old}) ?=", f"{old}s", "")
      for old in ("input", "output")],
    (rf"{_OPTIMIZER}(?P<old>lr) ?=", "learning_rate", ""),
    (rf"{_OPTIMIZER}(?P<old>decay) ?=", "learning_rate=a LearningRateSchedule", "it is ignored"),
    # Distributed Keras
    *[(rf"(?:from )?\bdistkeras\.{old}(?: import .+)?", f"from {new}", why) for old, new, why in [
        ("predictors", "helpers.transformers import ModelPredictor", ""),
        ("transformers", "helpers.transformers import LabelIndexTransformer",
         "pyspark.ml.feature has the others, such as OneHotEncoder and MinMaxScaler"),
        ("trainers", "helpers.training import SingleTrainer, AveragingTrainer",
         "AveragingTrainer replaces the asynchronous ones"),
        ("evaluators", "pyspark.ml.evaluation import MulticlassClassificationEvaluator", ""),
        ("utils", "helpers.records import json_to_dataframe_row",
         "nothing replaces the other functions"),
    ]],
    (r"\b(?:ADAG|DOWNPOUR|AEASGD|EAMSGD|DynSGD)\(", "AveragingTrainer(...)",
     "arguments after the loss by name; no rho, learning_rate, momentum or master_port"),
    (r"\.set_parallelism_factor\(|\.parameter_server\b", "leave it out",
     "there is no parameter server"),
    (r"\bAccuracyEvaluator\(",
     'MulticlassClassificationEvaluator(predictionCol=..., labelCol=..., metricName="accuracy")',
     ""),
    (r"\bOneHotTransformer\(", "OneHotEncoder(..., dropLast=False).fit(df)",
     "of pyspark.ml.feature"),
    (r"\bMinMaxTransformer\(", "MinMaxScaler(...).fit(df)", "of pyspark.ml.feature"),
    # Settings
    *[(f'"{re.escape(old)}"', f'"{new}"' if new else "leave it out",
       "the old name also works" if new else "it has no effect") for old, new in OLD_NAMES.items()],
    *[(rf'auto[._]offset[._]reset"?\]? ?[:=,] ?(?P<old>"{old}")', f'"{new}"',
       "the old value also works") for old, new in OLD_RESETS.items()],
    (rf'"[\w.,:-]*:{ZOOKEEPER_PORT}(?:[,/][^" ]*)?"', "for a stream, the brokers' addresses",
     "such as host:9092; Kafka 4 has no ZooKeeper"),
    (r'(?:--(?:packages|jars) (?=[^\s",]*(?:[\s"]|$)))?'
     r'(?<![^\s",])[^\s",]*spark-(?:streaming|sql)-kafka[^\s",]*', "leave it out",
     "the stream fetches the connector for the running Spark"),
    (r'(?<![^\s",])(?![^\s",]*spark-(?:streaming|sql)-kafka)[^\s",]+_2\.1[0-2]:[^\s",]+',
     "its build for Spark 4",
     "the name ends in _2.13"),
    (r'\bkafka\.serializer\.\w+coder\b|"serializer\.class"', "leave it out",
     "keyDecoder and valueDecoder decode"),
    (r'"spark\.streaming\.concurrentJobs"', "leave it out", "above 1 it is an error"),
    (r'"yarn-(client|cluster)"', r'"yarn"', r'and "spark.submit.deployMode": "\1"'),
    # kafka-python
    (r"\b(?:Simple|Keyed)Producer\b", "KafkaProducer", "kafka-python dropped the others"),
    (r"\b(?:SimpleConsumer|MultiProcessConsumer)\b", "KafkaConsumer",
     "kafka-python dropped the others"),
    (r"^from kafka\S* import (?:.*\W)?(?P<old>KafkaClient|SimpleClient)\b|"
     r"\b(?:kafka\.KafkaClient|SimpleClient)\b",
     "KafkaProducer, KafkaConsumer or KafkaAdminClient", "kafka-python dropped the others"),
    (r"\bkafka\.common\b", "kafka.errors or kafka.structs", ""),
    (r"\bNoBrokersAvailable\b", "KafkaTimeoutError", ""),
    (r"\.send_messages\(", ".send(...)", "a KafkaProducer's; Kafka takes bytes"),
    (rf"\.send\([^()]*, ?(?:value ?= ?)?(?P<old>json\.dumps\({_INSIDE}\))(?= ?[),])",
     r"\1.encode()", "Kafka takes bytes"),
    (r"[(,] ?(?P<old>metadata_broker_list) ?=", "bootstrap_servers", ""),
    (r"[(,] ?(?P<old>zookeeper_connect) ?=", "leave it out", "Kafka 4 has no ZooKeeper"),
    (r"[(,] ?(?P<old>async) ?=", "leave it out",
     "a word of Python 3; a KafkaProducer is asynchronous, and tweepy says threaded"),
    # Python 2
    (rf"{_START}print ?>> ?([\w.]+), ?([^;]+)", r"print(\2, file=\1)", ""),
    (rf"{_PRINT}([^;]*[^;, ])(?=;|$)", r"print(\1)", ""),
    (rf"{_PRINT}([^;]+),(?=;|$)", r'print(\1, end=" ")', ""),
    (rf"{_START}print(?=;|$)", "print()", ""),
    (rf"{_START}print ?\({_INSIDE}\) ?[-%,.+*/][^;]*", "print(...)", "all of it in parentheses"),
    (r"\blambda ?\([^:]*\) ?:", "lambda pair:", "with pair[0] and pair[1] for the names"),
    (r"^except ([\w.]+|\([^()]*\)), ?(\w+)", r"except \1 as \2", ""),
    (r"^raise ([\w.]+), ?(.+), ?(\w+)$", r"raise \1(\2).with_traceback(\3)", ""),
    (r"^raise ([\w.]+), ?(?!.*, ?\w+$)(.+)", r"raise \1(\2)", ""),
    (r"\blambda (?:\w+, ?)+\(", "lambda ..., pair:", "with pair[0] and pair[1] for the names"),
    (r"^def \w+\((?:[\w=, ]*, ?)?\([\w, ]+\)", "a name for the pair", "taken apart in the body"),
    (rf"{_START}exec (?=[\"\w])([^;]+)", r"exec(\1)", ""),
    (r"\b(\w+)\.next\(\)", r"next(\1)", ""),
    (r"\.(?:keys|values|items)\(\)\[", "list(...)[...]", "views have no positions"),
    (r"\.encode\([^()]*\)(?=\.(?:split|strip|lower|upper|replace|startswith)\()", "leave it out",
     "text is Unicode"),
    (r'\bopen\([^()]*(?P<old>"r?U")', '"r"', ""),
    (r"\bsys\.maxint\b", "sys.maxsize", ""),
    (r"`([^`]+)`", r"str(\1)", ""),
    (r"<>", "!=", ""),
    (rf"\b{MARK}(\w+)[lL]\b", r"\1", ""),
    (rf"\b{MARK}0([0-7]+)\b", r"0o\1", ""),
    (r"\.iter(items|keys|values)\(\)", r".\1()", ""),
    (r"\.has_key\(", "in", ""),
    (r"(?<![\w.])(?:unicode|basestring)(?= ?[(),])", "str", ""),
    (r"(?<![\w.])reload\(sys\)|\bsys\.setdefaultencoding\(", "leave it out", "text is Unicode"),
    (r"\burllib\.((?:un)?quote(?:_plus)?|urlencode)\b", r"urllib.parse.\1", ""),
    (r"\burllib\.(urlopen|urlretrieve)\b", r"urllib.request.\1", ""),
    *[(rf"(?<![\w.]){old}(?= ?\()", new, "") for old, new in {
        "xrange": "range", "long": "int", "raw_input": "input", "unichr": "chr"}.items()],
    *[(rf"(?:^(?:import (?:.*[ ,])?|from )|(?<![\w.])(?=\w+\.))(?P<old>{old})\b", new, "")
      for old, new in {
        "urlparse": "urllib.parse", "urllib2": "urllib.request", "cPickle": "pickle",
        "StringIO": "io", "ConfigParser": "configparser", "Queue": "queue"}.items()],
]  # fmt: skip

# Differences in the calls of a stream, for files that import the old module. Where a rule says
# 'the same', the call stays as it is, and the file's first one is enough.
STREAM_CHANGES = [
    (r"\bSparkContext\(", "get_spark(config={...}).sparkContext",
     "from helpers.spark; or the same, with PYSPARK_PYTHON set to this Python"),
    (r"\bStreamingContext\(", "the same, or new_streaming_context(spark, seconds)", ""),
    (r"\bcreateStream\((?:[^(),]*,){0,2}", "createStream(ssc, brokers, ...)",
     "no ZooKeeper; threads and storageLevel have no effect; to Kafka, the group is new"),
    (r"\bcreateDirectStream\(", "the same", "with a group.id, offsets are committed"),
    (r"\bTopicAndPartition\(|\bfromOffsets ?=", "the same", "also if the group has other offsets"),
    (r"\bOffsetRange\(|\bmessageHandler ?=", "the same", ""),
    (r"\b(?:key|value)Decoder ?=", "the same",
     "it gets bytes, and one that returns what it gets now returns no text"),
    (r"\[[01]\](?P<old>\.decode\([^()]*\))", "leave it out", "keys and values are text"),
    (r"\._raw(?:Message|Key)\b", ".message or .key", "as the decoders return them"),
    (r"\bcreateRDD\(|\bleaders ?=", "the same", "leaders has no effect"),
    (r"\bKafkaRDD\(", "leave it out", "the RDD of foreachRDD and transform has offsetRanges()"),
    (r"\boffsetRanges\(\)", "the same",
     "sorted, without partitions that have no new records; a group.id or a sink saves them"),
    (r"\bKazooClient\(", "a group.id, with commitAsync or without, or a sink", "to save offsets"),
    (r"\bforeachRDD\(", "the same, or foreachBatch(...)", "the stream stops if it fails"),
    (r"\.checkpoint\(|\bStreamingContext\.getOrCreate\(", "the same, with a new folder",
     "Spark can't read another version's checkpoint"),
    (r"(?<!\w)\w*ssc\.start\(\)|\.awaitTermination(?:OrTimeout)?\(\)?",
     "the same, or run_stream(ssc, ...)", "an error if a batch failed"),
    (r"(?<!\w)\w*ssc\.stop\(\)?", "the same, or stop_streaming(ssc, gracefully=True)", ""),
    (r"\bRow\((?:\*\*|\w+ ?=(?!=))", "the same, with the columns in the schema's order",
     "Spark 3 stopped sorting them by name"),
    (r'"group\.id"', "the same", "the stream begins at the group's offsets, and commits"),
    (r'"enable\.auto\.commit"', "the same", "if false, only commitAsync commits"),
    (r'"spark\.streaming\.(?:kafka\.m\w+RatePerPartition|backpressure\.\w+)"', "the same", ""),
    (r'"(?:auto\.commit\.interval\.ms|(?:key|value)\.deserializer)"|'
     r'"spark\.streaming\.(?:receiver\.[\w.]+|blockInterval|kafka\.maxRetries)"',
     "leave it out", "it has no effect"),
]  # fmt: skip
