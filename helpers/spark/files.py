"""Paths, and small files written atomically, on any file system of Spark's Hadoop client.

Hadoop and Spark interpret parts of a path as patterns, a scheme or a host; `exact_path` and
`exact_reader` prevent this. On the local file system, small files are flushed to disk, so that they
survive a power cut. `protect_folder` keeps other users out of a folder with settings.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from py4j.java_gateway import JavaClass, JavaObject
from pyspark.sql import DataFrameReader, SparkSession

from helpers.spark.errors import JAVA_ERRORS, java_causes, summary
from helpers.spark.jars import JarsError

# Matches paths that no file system of Hadoop accepts: empty, with a NUL, or not UTF-8.
_UNUSABLE = re.compile(r"^$|[\0\ud800-\udfff]")
# The beginning of a URI, up to its path.
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(//[^/]*)?(?=/)")
# A local path with two slashes, between which and the third one Hadoop looks for a host.
_WITH_HOST = re.compile(r"file://([^/].*)", re.IGNORECASE | re.DOTALL)
# Hadoop's jars for the file systems of clouds, by scheme; Spark doesn't include them.
_JARS = dict.fromkeys(("abfs", "abfss", "wasb", "wasbs"), "hadoop-azure")
_JARS |= {"s3a": "hadoop-aws", "oss": "hadoop-aliyun", "gs": "hadoop-gcp"}

# Names of files that Spark and the kit write into the checkpoint of a streaming context.
_CHECKPOINT_FILES = (
    r"\.?checkpoint-.*|[0-9a-f-]{36}|kafka-plans|receivedBlockMetadata|receivedData|temp"
)

_LOGGER = logging.getLogger(__name__)


def _is(error: Exception, *names: str) -> bool:
    """Return whether a Java error, or one of its causes (as with HDFS), has a simple class name."""
    return any(cause.getClass().getSimpleName() in names for cause in java_causes(error))


@contextlib.contextmanager
def _missing_as_python(files: JavaObject, path: JavaObject) -> Iterator[None]:
    """Raise Python's `FileNotFoundError` if Java raises an error because a path is missing.

    Looking first would not do: another process may remove the file between the look and its use.
    Java's error alone would not do either: it has the same one for too many open files.
    """
    try:
        yield
    except JAVA_ERRORS as error:
        reason = summary(error)
        may_be_there = re.search(r"\((?!No such file or directory)[^()]*\)$", reason)
        if not _is(error, "FileNotFoundException") or (may_be_there and files.exists(path)):
            raise
        raise FileNotFoundError(reason) from None


class JsonFolder:
    """A folder of JSON files, each written once.

    A file is written under a temporary name and then renamed atomically: a reader sees the complete
    file or nothing, and an existing file is never replaced.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    folder : str or path-like
        The folder's path or URI (``file:``, ``hdfs:``); it is created if it is missing.

    Attributes
    ----------
    uri : str
        The folder's path with its scheme.

    Raises
    ------
    OSError
        If the folder can't be created, for example because a parent is a file.

    Examples
    --------
    >>> folder = JsonFolder(spark, str(getfixture("tmp_path") / "plans"))
    >>> folder.write("first", {"events": 10})
    >>> folder.names(), folder.read("first")
    (['first'], {'events': 10})
    """

    def __init__(self, spark: SparkSession, folder: str | os.PathLike[str]) -> None:
        self._spark = spark
        path, self._files = _file_system(spark, folder)
        self._folder = self._files.makeQualified(path)
        self._local = _local_path(self._folder)
        self._make()
        # FileContext.rename fails if the target exists; FileSystem.rename may replace it.
        self._context = java_class(spark, "org.apache.hadoop.fs.FileContext").getFileContext(
            self._folder.toUri(), spark._jsc.hadoopConfiguration()
        )
        self.uri = self._folder.toString()

    def names(self) -> list[str]:
        """Return the names of the files, sorted, without the ``.json`` suffix."""
        names = folder_names(self._spark, self.uri)
        complete = (name for name in names if name.endswith(".json") and name[0] not in "._")
        return [name.removesuffix(".json") for name in complete]

    def write(self, name: str, content: Any) -> None:
        """Write a new file.

        Parameters
        ----------
        name : str
            The file's name, without ``.json``.
        content : object
            A value that `json` can serialize.

        Raises
        ------
        FileExistsError
            If a file of that name exists; it stays unchanged.
        OSError
            If the file can't be written, for example because the disk is full.
        """
        # The draft's name doesn't contain `name`, which may have the maximum length already.
        draft = f".{uuid.uuid4()}.draft"
        try:
            self._write_draft(draft, f"{json.dumps(content)}\n".encode())
            self._publish(draft, f"{name}.json")
        except FileExistsError:
            raise FileExistsError(f"{self.uri}/{name}.json exists already") from None
        except JAVA_ERRORS as error:
            raise OSError(f"{self.uri}/{name}.json can't be written: {summary(error)}") from None
        finally:
            # A leftover draft is harmless, and failing to delete it must not hide an earlier error.
            with contextlib.suppress(*JAVA_ERRORS):
                self._files.delete(self._path(draft), False)
        if self._local:
            _flush(self._local)  # the directory entry

    def read(self, name: str) -> Any:
        """Return the content of a file.

        Raises
        ------
        FileNotFoundError
            If there is no file of that name.
        """
        return json.loads(read_file(self._spark, f"{self.uri}/{name}.json"))

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""
        self._files.delete(self._path(f"{name}.json"), False)

    def changed_at(self, name: str) -> int | None:
        """Return a file's modification time in milliseconds since 1970; None if it is missing."""
        status = _status(self._files, self._path(f"{name}.json"))
        return None if status is None else status.getModificationTime()

    def touch(self, name: str, changed_at: int | None = None) -> None:
        """Set a file's modification time, in milliseconds since 1970, by default to now."""
        changed_at = round(time.time() * 1000) if changed_at is None else changed_at
        self._files.setTimes(self._path(f"{name}.json"), changed_at, -1)

    def _make(self) -> None:
        """Create the folder and its parents."""
        folders = (self._local, *self._local.parents) if self._local else ()
        missing = [folder for folder in folders if not folder.exists()]
        try:
            reason = None if self._files.mkdirs(self._folder) else "permission is missing"
        except JAVA_ERRORS as error:
            reason = summary(error).removesuffix(".")
        if reason:
            raise OSError(f"{self._folder} can't be created: {reason}. Check the path.")
        for folder in missing:
            _flush(folder.parent)

    def _write_draft(self, draft: str, content: bytes) -> None:
        """Write a file, and flush it to disk."""
        file = self._files.create(self._path(draft), False)
        try:
            file.write(content)
            file.hsync()
        finally:
            file.close()
        if self._local:  # where Hadoop's hsync reaches only the system's cache
            _flush(self._local / draft)

    def _publish(self, draft: str, name: str) -> None:
        """Give a file its name atomically; raise `FileExistsError` if the name is taken."""
        if self._local:
            # Hadoop checks for the target before it renames; another process may create it between.
            try:
                return os.link(self._local / draft, self._local / name)
            except FileExistsError:
                raise
            except OSError:  # many network file systems don't support hard links
                pass
        no_options = self._spark.sparkContext._gateway.new_array(
            java_class(self._spark, "org.apache.hadoop.fs.Options$Rename"), 0
        )
        try:
            self._context.rename(self._path(draft), self._path(name), no_options)
        except JAVA_ERRORS as error:
            if _is(error, "FileAlreadyExistsException"):
                raise FileExistsError from None
            raise

    def _path(self, name: str) -> JavaObject:
        return java_class(self._spark, "org.apache.hadoop.fs.Path")(self._folder, name)


def java_class(spark: SparkSession, name: str) -> JavaClass:
    """Return a Java class by its full name.

    ``spark._jvm`` would make a call to Java for each part of the name.

    Examples
    --------
    >>> java_class(spark, "java.lang.Math").abs(-7)
    7
    """
    return JavaClass(name, spark.sparkContext._gateway._gateway_client)


def exact_path(spark: SparkSession, path: str | os.PathLike[str]) -> str:
    """Return a path in the form in which Hadoop uses exactly this path.

    A relative path on the local file system is made absolute, because Java's current folder may be
    another one, and because Hadoop takes the text before a colon for a scheme.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client uses the path.
    path : str or path-like
        A path, or a URI such as ``hdfs:///tmp/scored`` as a string.

    Raises
    ------
    ValueError
        If Hadoop can't use the path; the message says what to do.

    Examples
    --------
    >>> exact_path(spark, Path("/tmp/scored[1]"))
    '/tmp/scored[1]'
    """
    text = os.fsdecode(path)
    uri = _URI.match(text)
    if _UNUSABLE.search(text):
        raise _path_error(
            text, "is empty, or has a NUL or bytes that are not UTF-8: choose another name"
        )
    with_host = _WITH_HOST.fullmatch(text)
    if with_host:
        after_host = with_host[1].removeprefix("localhost/")
        raise _path_error(
            text, f"names a host, which a local path can't have: write file:///{after_host}"
        )
    if uri and isinstance(path, os.PathLike):
        raise _path_error(text, "is a URI, which pathlib changes: pass it as a string")
    if not uri:
        text = re.sub("^//+", "/", text)  # Hadoop takes the name after two slashes for a host
    name = text[uri.end() :] if uri else text
    if name.startswith("/") and name.isascii() and ":" not in name:
        return text  # without a call to Java
    scheme = uri["scheme"].lower() if uri else _default_scheme(spark)
    if scheme == "file":
        text = text if uri else os.path.abspath(text)
        _check_encoding(spark, text)
    elif "hdfs" in scheme and ":" in name:
        raise _path_error(text, "has a colon, which HDFS doesn't allow: choose another name")
    return text


def exact_reader(spark: SparkSession) -> DataFrameReader:
    """Return a reader that takes paths from `exact_path` as they are, and leaves nothing out.

    Otherwise Spark would read ``scored*`` as all paths that begin with ``scored``, and would not
    find ``scored[1]``. A site may also have told it to skip missing and corrupt files.

    Examples
    --------
    >>> folder = str(getfixture("tmp_path") / "scored[1]")
    >>> spark.range(3).write.parquet(folder)
    >>> exact_reader(spark).parquet(folder).count()
    3
    """
    # Spark sets this option (DataSource.GLOB_PATHS_KEY) for files that it has listed. Escaping the
    # path is not enough, because Hadoop's patterns can't contain a colon.
    return spark.read.options(
        __globPaths__=False, ignoreMissingFiles=False, ignoreCorruptFiles=False
    )


def full_path(spark: SparkSession, path: str | os.PathLike[str]) -> str:
    """Return a path with its scheme, as Structured Streaming needs it for a checkpoint.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client knows the default file system.
    path : str or path-like
        Such as ``/tmp/scored`` or ``hdfs:///tmp/scored``.

    Examples
    --------
    >>> full_path(spark, "/tmp/scored")
    'file:/tmp/scored'
    """
    return _qualified(spark, path).toString()


def folder_names(spark: SparkSession, folder: str) -> list[str]:
    """Return the names of the files and folders in a folder, sorted; none if it doesn't exist.

    Examples
    --------
    >>> folder_names(spark, "/no/such/folder")
    []
    """
    path, files = _file_system(spark, folder)
    try:
        with _missing_as_python(files, path):
            statuses = files.listStatus(path)
    except FileNotFoundError:
        return []
    # As one string, because one call per name would take a second per thousand names.
    found = java_class(spark, "org.apache.hadoop.fs.FileUtil").stat2Paths(statuses)
    wrapped = java_class(spark, "scala.Predef").genericWrapArray(found)
    paths = wrapped.mkString("\0").split("\0")
    return sorted(path.rpartition("/")[2] for path in paths if path)


def file_size(spark: SparkSession, path: str | os.PathLike[str]) -> int | None:
    """Return the size of a file in bytes; None if the path is not a file.

    Examples
    --------
    >>> file_size(spark, getfixture("tmp_path")) is None
    True
    """
    path, files = _file_system(spark, path)
    status = _status(files, path)
    return status.getLen() if status is not None and status.isFile() else None


def flush_folder(spark: SparkSession, folder: str, inside: str) -> None:
    """Flush a folder's files and directory entries to disk, if they are on the local file system.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    folder : str
        The folder; it contains only files.
    inside : str
        A parent folder: its entries, and those of the folders in between, are also flushed.

    Examples
    --------
    >>> flush_folder(spark, str(getfixture("tmp_path")), str(getfixture("tmp_path").parent))
    """
    local, outermost = (_local_path(_qualified(spark, name)) for name in (folder, inside))
    if local is None:
        return
    for file in local.iterdir():
        _flush(file)
    while local != outermost.parent:
        _flush(local)
        local = local.parent


def folder_size(spark: SparkSession, folder: str) -> int:
    """Return the total size of the files in a folder, in bytes.

    Examples
    --------
    >>> _ = (getfixture("tmp_path") / "note").write_text("42")
    >>> folder_size(spark, str(getfixture("tmp_path")))
    2
    """
    path, files = _file_system(spark, folder)
    return files.getContentSummary(path).getLength()


def read_file(spark: SparkSession, name: str) -> str:
    """Return the text of a file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> _ = (getfixture("tmp_path") / "note").write_text("42")
    >>> read_file(spark, str(getfixture("tmp_path") / "note"))
    '42'
    """
    path, files = _file_system(spark, name)
    with _missing_as_python(files, path):
        file = files.open(path)
    try:
        return bytes(file.readAllBytes()).decode()
    finally:
        file.close()


def remove_folder(spark: SparkSession, folder: str) -> None:
    """Remove a folder and its contents, if it exists."""
    path, files = _file_system(spark, folder)
    files.delete(path, True)


def protect_folder(spark: SparkSession, path: str) -> None:
    """Make a folder that holds settings, including passwords, private to this user.

    A missing folder is created. A folder that contains anything other than Spark's files stays
    unchanged, and a warning is logged.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    path : str
        The folder's path or URI, such as a streaming context's checkpoint.

    Examples
    --------
    >>> protect_folder(spark, str(getfixture("tmp_path") / "checkpoint"))
    >>> oct((getfixture("tmp_path") / "checkpoint").stat().st_mode)
    '0o40700'
    """
    folder, files = _file_system(spark, path)
    if not files.exists(folder):
        files.mkdirs(folder)
    elif not files.getFileStatus(folder).getPermission().toShort() & 0o077:
        return
    if all(re.fullmatch(_CHECKPOINT_FILES, name) for name in folder_names(spark, path)):
        only_mine = java_class(spark, "org.apache.hadoop.fs.permission.FsPermission")("700")
        with contextlib.suppress(*JAVA_ERRORS):  # the folder belongs to another user
            files.setPermission(folder, only_mine)
            return
    _LOGGER.warning(
        "%s holds settings, including passwords, and other users can read it: chmod 700 it, or use "
        "a separate folder.", path,
    )  # fmt: skip


def _status(files: JavaObject, path: JavaObject) -> JavaObject | None:
    """Return Hadoop's status of a file or folder; None if it is missing."""
    with contextlib.suppress(FileNotFoundError), _missing_as_python(files, path):
        return files.getFileStatus(path)
    return None


def _default_scheme(spark: SparkSession) -> str:
    """Return the scheme of paths that have none."""
    file_system = java_class(spark, "org.apache.hadoop.fs.FileSystem")
    return file_system.getDefaultUri(spark._jsc.hadoopConfiguration()).getScheme()


def _check_encoding(spark: SparkSession, path: str) -> None:
    """Raise `ValueError` if Java can't write a local path in its locale's encoding."""
    encoding = java_class(spark, "java.lang.System").getProperty("sun.jnu.encoding")
    charset = java_class(spark, "java.nio.charset.Charset").forName(encoding)
    if charset.decode(charset.encode(path)).toString() != path:  # `encode` writes ? if it can't
        raise _path_error(
            path,
            f"can't be written in {encoding}, the encoding of Java's locale: start Python with the "
            "environment variable LC_ALL=C.UTF-8, or choose a path in ASCII",
        )


def _path_error(path: str, fault: str) -> ValueError:
    return ValueError(f"the path {path!r} {fault}.")


def _file_system(
    spark: SparkSession, name: str | os.PathLike[str]
) -> tuple[JavaObject, JavaObject]:
    """Return a name's Hadoop path and file system; raise `JarsError` if Spark lacks its jar."""
    name = exact_path(spark, name)
    try:
        path = java_class(spark, "org.apache.hadoop.fs.Path")(name)
        return path, path.getFileSystem(spark._jsc.hadoopConfiguration())
    except JAVA_ERRORS as error:
        if _is(error, "ClassNotFoundException", "UnsupportedFileSystemException"):
            raise JarsError(_missing_jar(spark, name)) from None
        raise OSError(f"{name!r} can't be used: {summary(error)}") from None


def _missing_jar(spark: SparkSession, name: str) -> str:
    """Return a message that names the jar Spark lacks for a file system, and how to add it."""
    scheme = name.partition(":")[0]
    if scheme not in _JARS:
        return f"Spark has no file system for {scheme!r}, as in {name!r}: check the path."
    version = java_class(spark, "org.apache.hadoop.util.VersionInfo").getVersion()
    jar = f"org.apache.hadoop:{_JARS[scheme]}:{version}"
    return (
        f"Spark lacks the jar that {scheme}: needs, as in {name!r}: start Spark with it, by "
        f'get_spark(config={{"spark.jars.packages": "{jar}"}}) or spark-submit --packages {jar}.'
    )


def _qualified(spark: SparkSession, name: str | os.PathLike[str]) -> JavaObject:
    """Return the fully qualified Hadoop path for a name."""
    path, files = _file_system(spark, name)
    return files.makeQualified(path)


def _local_path(path: JavaObject) -> Path | None:
    """Return the path on the local file system; None if it is on another one."""
    uri = path.toUri()
    return Path(uri.getPath()) if uri.getScheme() == "file" else None


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems don't flush folders, which need it less there. One that may be written
        # but not read can't be flushed, so a power cut can cost its newest entry.
        unflushable = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
        if not (path.is_dir() and error.errno in unflushable):
            raise
