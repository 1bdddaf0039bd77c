"""Spark on a laptop and on a cluster: the session, its jars, and files that Spark can reach.

`get_spark` returns the existing session or starts one with the Kafka connector. `jars` fetches jars
from Maven Central, `errors` finds the reason in Java's errors, `java_exit` says whether Java has
exited, `files` reads and writes small files on any of Spark's file systems, `machine` finds the
available cores and memory, `callbacks` keeps other users out of Python, and `scratch` provides the
folder for temporary files and the log.
"""

from helpers.spark.arrow import arrow_function, arrow_table
from helpers.spark.callbacks import guard_callbacks
from helpers.spark.errors import (
    JAVA_ERRORS,
    cause_message,
    cause_name,
    is_interrupt,
    java_causes,
    summary,
)
from helpers.spark.files import (
    JsonFolder,
    exact_path,
    exact_reader,
    file_size,
    flush_folder,
    folder_names,
    folder_size,
    full_path,
    java_class,
    protect_folder,
    read_file,
    remove_folder,
)
from helpers.spark.jars import (
    CONNECTOR,
    INSTALL_JAVA,
    JarsError,
    NoSuchJarError,
    archive_option,
    fetch_jars,
    java_command,
    new_archive,
    spark_and_scala,
    spark_home,
    spark_program,
)
from helpers.spark.java_exit import (
    END_SECONDS,
    how_java_exited,
    java_has_exited,
    java_ran_out_of_memory,
)
from helpers.spark.machine import available_cores, available_memory
from helpers.spark.scratch import log_file, scratch_folder
from helpers.spark.session import (
    SUBMIT_ARGUMENTS,
    SessionError,
    changed_settings,
    check_running,
    fetch,
    get_spark,
    hide_secrets,
    names_connector,
    separate_session,
    spark_has_ended,
)
