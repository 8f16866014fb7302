"""Malicious pickles of public write-ups: none runs, each is refused by name, and none costs more than a small multiple of its size.

Sources of the lists: the advisories of picklescan and fickling and those scanners' own tests, "Sour Pickles" (Black Hat USA
2011), the papers on gadgets that scanners miss, CVE-2025-1716, CVE-2025-10155, CVE-2025-10156, CVE-2025-10157. Every attempt is
made under the guard of the fuzz harness: an audit hook sees whatever runs, and a canary would be left behind.
"""

from __future__ import annotations

import marshal
import pickle
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shardwright.errors import ContainerError, ShardwrightError, UnsafePickleError, UnsupportedError
from shardwright.planner.containers._unpickle import unpickle
from shardwright.planner.containers.torch_zip import Inert, TorchZip

from .harness import attempt
from .mutators_pickle import text_op
from .mutators_zip import Archive, Member, build, parse
from .stores import MemoryStore
from .targets_containers import TORCH_ZIP, UNPICKLE

CANARY = "touch CANARY"
SCRIPT = "open('CANARY','w')"

GADGETS: dict[str, tuple[str | bytes, ...]] = {
    # Commands.
    **dict.fromkeys(("os.system", "posix.system", "nt.system", "os.popen", "commands.getoutput", "subprocess.getoutput"), (CANARY,)),
    **dict.fromkeys(
        ("os.execv", "os.spawnv", "subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_output"), (CANARY,)
    ),
    **dict.fromkeys(
        ("pty.spawn", "_posixsubprocess.fork_exec", "multiprocessing.util.spawnv_passfds", "asyncio.subprocess.create_subprocess_shell"),
        (CANARY,),
    ),
    **dict.fromkeys(("asyncio.unix_events._UnixSubprocessTransport._start", "pydoc.pipepager", "torch.utils.collect_env.run"), (CANARY,)),
    **dict.fromkeys(
        ("torch._inductor.codecache.compile_file", "pip.main", "pip._internal.cli.main.main", "ensurepip._run_pip", "venv.main"), (CANARY,)
    ),
    **dict.fromkeys(("webbrowser.open", "antigravity.webbrowser.open", "distutils.spawn.spawn", "setuptools.distutils_patch.x"), (CANARY,)),
    # Python source.
    **dict.fromkeys(
        ("builtins.eval", "builtins.exec", "builtins.compile", "__builtin__.eval", "__builtin__.execfile", "__builtin__.apply"), (SCRIPT,)
    ),
    **dict.fromkeys(
        ("runpy.run_path", "runpy.run_module", "runpy._run_code", "timeit.timeit", "timeit.main", "trace.Trace.run"), (SCRIPT,)
    ),
    **dict.fromkeys(
        ("bdb.Bdb.run", "pdb.run", "cProfile.run", "cProfile.runctx", "profile.Profile.run", "doctest.debug_script"), (SCRIPT,)
    ),
    **dict.fromkeys(("code.InteractiveInterpreter.runcode", "code.InteractiveInterpreter", "codeop.compile_command", "exec.x"), (SCRIPT,)),
    **dict.fromkeys(
        ("idlelib.run.Executive.runcode", "idlelib.pyshell.ModifiedInterpreter.runcode", "idlelib.calltip.get_entity"), (SCRIPT,)
    ),
    **dict.fromkeys(
        ("idlelib.autocomplete.AutoComplete.get_entity", "idlelib.debugobj.ObjectTreeItem.SetText", "typing.get_type_hints"), (SCRIPT,)
    ),
    **dict.fromkeys(("lib2to3.pgen2.pgen.ParserGenerator.make_label", "logging.config.dictConfig", "ast.literal_eval"), (SCRIPT,)),
    **dict.fromkeys(
        ("numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef", "numpy.f2py.crackfortran.param_eval"), (SCRIPT,)
    ),
    **dict.fromkeys(
        ("torch.jit.unsupported_tensor_ops.execWrapper", "torch._dynamo.guards.GuardBuilder.get", "torch.jit.script"), (SCRIPT,)
    ),
    **dict.fromkeys(
        ("torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression", "torch.fx.graph_module._exec_with_source"), (SCRIPT,)
    ),
    **dict.fromkeys(
        ("torch.utils.bottleneck.__main__.run_cprofile", "torch.utils.bottleneck.__main__.run_autograd_prof", "pandas.eval"), (SCRIPT,)
    ),
    # Names turned into functions.
    **dict.fromkeys(
        ("builtins.getattr", "builtins.__import__", "builtins.globals", "builtins.vars", "builtins.type", "builtins.map"), ("os",)
    ),
    **dict.fromkeys(
        ("importlib.import_module", "importlib.util.find_spec", "importlib.machinery.SourceFileLoader", "imp.load_source"), ("os",)
    ),
    **dict.fromkeys(
        ("pkgutil.resolve_name", "pydoc.locate", "zipimport.zipimporter", "site.addpackage", "sys.modules", "sys.setprofile"), ("os",)
    ),
    **dict.fromkeys(
        ("operator.attrgetter", "operator.methodcaller", "operator.itemgetter", "functools.partial", "functools.reduce"), ("system",)
    ),
    **dict.fromkeys(
        ("types.FunctionType", "types.CodeType", "types.ModuleType", "weakref.finalize", "atexit.register", "signal.signal"), ("os",)
    ),
    **dict.fromkeys(
        ("ctypes.CDLL", "ctypes.util.find_library", "ctypes.pythonapi", "_ctypes.dlopen", "numpy.ctypeslib.load_library"), ("libc.so.6",)
    ),
    # A pickle, or code, inside the pickle.
    **dict.fromkeys(
        ("pickle.loads", "_pickle.loads", "cPickle.loads", "dill.loads", "cloudpickle.loads", "marshal.loads"), (b"cos\nsystem\n.",)
    ),
    **dict.fromkeys(
        ("torch.load", "torch.serialization.load", "torch.storage._load_from_bytes", "torch.hub.load", "torch.jit.load"), ("CANARY",)
    ),
    **dict.fromkeys(("numpy.load", "joblib.load", "pandas.read_pickle", "shelve.open", "torch.package.PackageImporter"), ("CANARY",)),
    **dict.fromkeys(
        ("torch.utils._config_module.ConfigModule.load_config", "torch.utils.data.datapipes.utils.decoder.basichandlers"),
        (b"cos\nsystem\n.",),
    ),
    **dict.fromkeys(
        ("lib2to3.pgen2.grammar.Grammar.loads", "multiprocessing.reduction.ForkingPickler.loads", "logging.config._resolve"), (b"N.",)
    ),
    # Files and the network.
    **dict.fromkeys(
        ("builtins.open", "io.open", "_io.FileIO", "codecs.open", "os.remove", "os.open", "shutil.rmtree", "shutil.copy"), ("CANARY", "w")
    ),
    **dict.fromkeys(
        ("linecache.getlines", "fileinput.input", "distutils.file_util.write_file", "pathlib.Path.write_text", "tempfile.mktemp"),
        ("CANARY", "w"),
    ),
    **dict.fromkeys(
        ("socket.socket", "socket.create_connection", "ssl.get_server_certificate", "httplib.HTTPSConnection", "http.client.x"),
        ("localhost",),
    ),
    **dict.fromkeys(
        (
            "requests.api.get",
            "aiohttp.client.ClientSession",
            "urllib.request.urlopen",
            "ftplib.FTP",
            "smtplib.SMTP",
            "xmlrpc.client.ServerProxy",
        ),
        ("localhost",),
    ),
    **dict.fromkeys(
        ("builtins.breakpoint", "builtins.input", "builtins.print", "sys.exit", "os._exit", "faulthandler._sigsegv", "gc.get_objects"), ()
    ),
}


def arguments(values: tuple[str | bytes, ...]) -> bytes:
    made = (text_op(v) if isinstance(v, str) else pickle.SHORT_BINBYTES + bytes([len(v)]) + v for v in values)
    return pickle.MARK + b"".join(made) + pickle.TUPLE


def stack_global(module: str, name: str) -> bytes:
    return text_op(module) + text_op(name) + b"\x93"


def confused_memo(module: str, name: str) -> bytes:
    """Scanners that take the second for the memo's contents see an innocent name."""
    put = text_op(module) + b"q\x000" + text_op(name) + b"q\x010"
    return put + text_op("torch._utils") + b"\x940" + text_op("_rebuild_tensor_v2") + b"\x940" + b"h\x00h\x01\x93"


def spellings(module: str, name: str, values: tuple[str | bytes, ...]) -> Iterator[tuple[str, bytes]]:
    args = arguments(values)
    by_line = f"c{module}\n{name}\n".encode()
    yield "global", b"\x80\x02" + by_line + args + b"R."
    yield "stack-global", b"\x80\x04" + stack_global(module, name) + args + b"R."
    yield "split", b"\x80\x04" + stack_global(module.split(".")[0], f"{module}.{name}".partition(".")[2]) + args + b"R."
    yield "confused-memo", b"\x80\x04" + confused_memo(module, name) + args + b"R."
    yield "new-object", b"\x80\x04" + stack_global(module, name) + args + b"\x81."
    yield "new-object-ex", b"\x80\x04" + stack_global(module, name) + args + b"}\x92."
    yield "popped", b"\x80\x02" + by_line + args + b"R0}."
    yield "mentioned", b"\x80\x02" + by_line + b"."
    yield "as a key", b"\x80\x02}" + by_line + b"Ns."
    yield "set state", b"\x80\x02" + by_line + args + b"R}" + text_op("__setstate__") + by_line + b"sb."
    yield "after a value", b"\x80\x02}q\x00" + text_op("model") + b"}s" + text_op("x") + by_line + args + b"Rs."
    yield "lying frame", b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + stack_global(module, name) + args + b"R."


def archive(pickled: bytes) -> bytes:
    return build(Archive((Member(b"archive/data.pkl", pickled), Member(b"archive/version", b"3\n"), Member(b"archive/data/0", bytes(16)))))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("gadget", GADGETS)
def test_no_gadget_is_called(gadget: str) -> None:
    module, _, name = gadget.rpartition(".")
    for spelling, pickled in spellings(module, name, GADGETS[gadget]):
        refusal = attempt(TORCH_ZIP, archive(pickled))
        if gadget == "builtins.getattr":  # known, but for the enum members of frameworks only
            assert isinstance(refusal, ContainerError) or spelling in ("mentioned", "split"), spelling
            continue
        assert isinstance(refusal, UnsafePickleError), (spelling, refusal)
        full = gadget.replace("__builtin__", "builtins").replace("_io.", "io.")
        assert full in str(refusal) and refusal.file == "m.pt" and refusal.remedy, spelling


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("gadget", ["os.system", "builtins.eval", "torch.load"])
def test_opcodes_that_call_by_themselves_are_unknown(gadget: str) -> None:
    module, _, name = gadget.rpartition(".")
    by_line, args = f"{module}\n{name}\n".encode(), text_op(CANARY)
    for pickled in (b"(" + args + b"i" + by_line, b"(c" + by_line + args + b"o", b"(S'x'\ni" + by_line, b"c" + by_line + b"(S'x'\ntR"):
        for head in (b"", b"\x80\x02", b"\x80\x04"):
            refusal = attempt(TORCH_ZIP, archive(head + pickled + b"."))
            assert isinstance(refusal, UnsafePickleError | ContainerError)


def chained() -> dict[str, bytes]:
    """Chains from write-ups: several steps, where the first ones are harmless or known."""
    get = b"c__builtin__\ngetattr\n"
    code = marshal.dumps(compile(SCRIPT, "x", "exec"))
    protocol0 = (
        b"c__builtin__\nglobals\n(tRp100\n0c__builtin__\ncompile\n(S'1'\nS''\nS'exec'\ntRp101\n0c__builtin__\neval\n(g101\ng100\ntR."
    )
    return {
        "sour pickles": protocol0,
        "unicode opcodes": b"Vos\np2\n0Vsystem\np3\n0Vtorch\np0\n0g2\ng3\n\x93(Vtouch CANARY\ntR.",
        "attrgetter": stack_global("operator", "attrgetter")
        + text_op("system")
        + b"\x85R"
        + stack_global("builtins", "__import__")
        + text_op("os")
        + b"\x85R\x85R.",
        "getattr of a dict": get + b"(c__builtin__\ndict\n" + text_op("get") + b"tR.",
        "getattr of a tensor": get + b"(ctorch\nTensor\n" + text_op("__class__") + b"tR.",
        "getattr of getattr": get + b"(" + get + text_op("__self__") + b"tR.",
        "getattr of a stand-in's method": get + b"(cmegatron.x\nC\n" + text_op("__init__") + b"tR" + b"(tR.",
        "getattr of a stand-in's result": get + b"(cmegatron.x\nC\n)R" + text_op("__globals__") + b"tR.",
        "getattr of a library object": get + b"(cargparse\nNamespace\n" + text_op("__init__.__globals__") + b"tR)R.",
        "getattr of a dtype": get + b"(ctorch\nfloat32\n" + text_op("__reduce__") + b"tR.",
        "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text_op("__code__") + b"Nsb.",
        "state of a dict": b"}}" + text_op("__class__") + b"Nsb.",
        "state of a set": b"\x8f}b.",
        "state of a type": b"ccollections\nOrderedDict\n}" + text_op("__reduce__") + b"cos\nsystem\nsb.",
        "default factory": b"ccollections\ndefaultdict\ncos\nsystem\n\x85R.",
        "counter of a call": b"ccollections\nCounter\n(cos\nsystem\n" + text_op(CANARY) + b"\x85Rt R.",
        "ordered dict of pairs": b"ccollections\nOrderedDict\n(](](cos\nsystem\nNeetR.",
        "reconstructor": b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
        "reconstructor of a known class": b"ccopy_reg\n_reconstructor\n(ccollections\nOrderedDict\nc__builtin__\nobject\nNtR.",
        "rebuild by a gadget": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n" + text_op(CANARY) + b"\x85NtR.",
        "rebuild by a stand-in": b"ctorch._tensor\n_rebuild_from_type_v2\n(cmegatron.x\nf\nctorch\nTensor\n)NtR.",
        "rebuild by itself": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00ctorch\nTensor\n(h\x00ctorch\nTensor\n)NtNtR.",
        "encode by another codec": b"c_codecs\nencode\n(" + text_op("a") + text_op("rot13") + b"tR.",
        "encode by a codec's codec": b"c_codecs\nencode\n(" + text_op("a") + text_op("zip") + b"tR.",
        "bytes of a number": b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
        "bytearray of a number": b"cbuiltins\nbytearray\n(\x8a\x08" + struct.pack("<q", 1 << 60) + b"tR.",
        "complex of text": b"cbuiltins\ncomplex\n(" + text_op("1") + text_op("2") + b"tR.",
        "size of a size": b"ctorch\nSize\n(\x8a\x08" + struct.pack("<q", 1 << 62) + b"tR.",
        "marshal and types": stack_global("marshal", "loads") + pickle.SHORT_BINBYTES + bytes([len(code)]) + code + b"\x85R.",
        "extension 1": b"\x82\x01.",
        "extension 2": b"\x83\x01\x00.",
        "extension 4": b"\x84\x01\x00\x00\x00.",
        "persistent id of text": b"P0\n.",
        "persistent id of a call": b"cos\nsystem\n" + text_op(CANARY) + b"\x85RQ.",
        "persistent id of a stand-in": b"(" + text_op("storage") + b"cmegatron.x\nS\n" + text_op("0") + text_op("cpu") + b"K\x01tQ.",
        "persistent id with a path": b"(" + text_op("module") + text_op("m") + text_op("/etc/passwd") + text_op("x") + b"tQ.",
        "out of band": b"\x97.",
        "read only": b"N\x98.",
        "dotted below a framework": stack_global("os", "path.os.system") + b")R.",
        "a prefix of a framework": stack_global("megatronx", "f") + b")R.",
        "a framework's parent": stack_global("torch", "_C._x") + b")R.",
        "two names in one line": b"ctorch os\nsystem\n)R.",
        "spaces": b"cos \nsystem\n)R.",
        "a newline": stack_global("os\nsystem", "x") + b")R.",
        "an empty module": stack_global("", "os.system") + b")R.",
        "bytes for a name": pickle.SHORT_BINBYTES + b"\x02os" + text_op("system") + b"\x93)R.",
        "old text for a name": b"U\x02osU\x06system\x93)R.",
        "look-alike letters": stack_global("оs", "system") + b")R.",
        "surrogates": pickle.BINUNICODE + b"\x03\x00\x00\x00\xed\xb2\x80" + text_op("x") + b"\x93.",
        "upper case": stack_global("OS", "system") + b")R.",
    }


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(("name", "pickled"), chained().items(), ids=chained())
def test_no_chain_gets_anywhere(name: str, pickled: bytes) -> None:
    for head in (b"", b"\x80\x02", b"\x80\x04"):
        refusal = attempt(TORCH_ZIP, archive(head + pickled))
        assert isinstance(refusal, UnsafePickleError | ContainerError), name


@pytest.mark.usefixtures("canary")
def test_framework_objects_are_carried_and_not_run() -> None:
    """What is accepted under a framework's name is a name and its arguments, whatever the name is."""
    for module, name in (
        ("megatron.core", "os.system"),
        ("deepspeed", "__builtins__.eval"),
        ("nemo.x", "__import__"),
        ("torch._C", "_nn.system"),
    ):
        pickled = (
            b"\x80\x04" + stack_global(module, name) + text_op(CANARY) + b"\x85R}" + text_op("__setstate__") + text_op(CANARY) + b"sb."
        )
        data = archive(pickled)
        assert attempt(TORCH_ZIP, data) is None
        index = TorchZip().read(MemoryStore({"m.pt": data}), "m.pt")
        carried = index.objects[""]
        assert isinstance(carried, Inert) and (carried.module, carried.name, carried.args) == (module, name, (CANARY,))


@pytest.mark.usefixtures("canary")
def test_only_the_first_pickle_counts() -> None:
    """As for torch: what follows STOP is not read, so it neither runs nor decides."""
    evil = b"\x80\x02cos\nsystem\n" + text_op(CANARY) + b"\x85R."
    assert unpickle(b"\x80\x02}." + evil, "m.pt") == {}
    assert attempt(TORCH_ZIP, archive(b"\x80\x02}." + evil)) is None
    assert isinstance(attempt(TORCH_ZIP, archive(evil + b"\x80\x02}.")), UnsafePickleError)


# Archives that hide their pickle from scanners.

EVIL = b"\x80\x02cposix\nsystem\n" + text_op(CANARY) + b"\x85R."
GOOD = b"\x80\x02}."


def hidden() -> dict[str, tuple[bytes, type[ShardwrightError] | None]]:
    plain = archive(EVIL)
    found = parse(plain)
    assert found is not None
    first, *rest = found.members

    def with_first(**changes: object) -> bytes:
        return build(Archive((replace(first, **changes), *rest)))

    def at(signature: bytes, offset: int, value: bytes) -> bytes:
        place = plain.index(signature) + offset
        return plain[:place] + value + plain[place + len(value) :]

    benign = archive(GOOD)
    cases: dict[str, tuple[bytes, type[ShardwrightError] | None]] = {
        "wrong checksum in the directory": (at(b"PK\1\2", 16, b"\xff\xff\xff\xff"), UnsafePickleError),
        "wrong checksum in the local header": (at(b"PK\3\4", 14, b"\xff\xff\xff\xff"), UnsafePickleError),
        "encrypted in the local header only": (at(b"PK\3\4", 6, b"\x01\x00"), ContainerError),
        "encrypted in the directory only": (at(b"PK\1\2", 8, b"\x01\x00"), ContainerError),
        "deflated": (with_first(method=8), ContainerError),
        "a method nobody knows": (with_first(method=97), ContainerError),
        "another name in the local header": (with_first(name_there=b"archive/data.txt"), ContainerError),
        "the name twice": (build(Archive((replace(first, payload=GOOD), first, *rest))), ContainerError),
        "one offset twice": (build(Archive((first, replace(first, name=b"archive/x", at=0), *rest))), ContainerError),
        "sizes apart": (with_first(sizes=(5, 5)), ContainerError),
        "one byte shorter in the directory": (at(b"PK\1\2", 24, struct.pack("<L", len(EVIL) - 1)), ContainerError),
        "a second archive before": (benign + plain, ContainerError),
        "a second archive after": (plain + benign, ContainerError),
        "an end record in the comment": (build(Archive((first, *rest), comment=benign[-22:])), ContainerError),
        "a gap before the directory": (build(Archive((first, *rest), gap=b"PK\1\2" + bytes(42))), UnsafePickleError),
        "a gap behind the directory": (build(Archive((first, *rest), gap_after=bytes(64))), ContainerError),
        "a gap behind the wide directory": (build(Archive((first, *rest), gap_after=bytes(64), wide=True)), ContainerError),
        "another disk": (at(b"PK\5\6", 4, b"\x01\x00"), ContainerError),
        "hidden in a folder of its own": (build(Archive((Member(b"archive/data.pkl", GOOD), Member(b"evil/data.pkl", EVIL)))), None),
        "hidden in a longer name": (build(Archive((Member(b"archive/data.pkl", GOOD), Member(b"archive/data.pkl/data.pkl", EVIL)))), None),
        "a folder above": (build(Archive((Member(b"archive/data.pkl", GOOD), Member(b"archive/../data.pkl", EVIL)))), ContainerError),
        "TorchScript": (build(Archive((first, Member(b"archive/constants.pkl", EVIL)))), UnsupportedError),
        "a picture": (b"\x89PNG\r\n\x1a\n" + EVIL, ContainerError),
        "7z": (b"7z\xbc\xaf'\x1c" + EVIL, ContainerError),
        "a bare pickle": (EVIL, ContainerError),
        "a bare pickle of protocol 0": (b"cos\nsystem\n(S'x'\ntR.", ContainerError),
        "a pickle with an archive behind": (EVIL + benign, ContainerError),
        "an older torch's pickles": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + EVIL, UnsupportedError),
        "a numpy array": (b"\x93NUMPY\x01\x00" + EVIL, ContainerError),
        "nothing": (b"", ContainerError),
        "an empty archive": (b"PK\5\6" + bytes(18), ContainerError),
        "an archive without entries": (b"PK\3\4" + bytes(30) + b"PK\5\6" + bytes(18), ContainerError),
    }
    return cases


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(("data", "expected"), hidden().values(), ids=hidden())
def test_archives_hide_nothing(data: bytes, expected: type[ShardwrightError] | None) -> None:
    refusal = attempt(TORCH_ZIP, data)
    assert refusal is None if expected is None else isinstance(refusal, expected), refusal


# Bombs: the guard fails on more than three CPU seconds, or more memory than a hundred bytes for each of the input's.


def repeated(once: bytes, times: int, setup: bytes) -> bytes:
    return b"\x80\x02(" + setup + once * times + b"t."


def put(slot: int, pushed: bytes) -> bytes:
    return pushed + b"q" + bytes([slot]) + b"0"


def numbers(count: int) -> bytes:
    return b"](" + b"".join(b"K" + bytes([i]) for i in range(count)) + b"e"


def pairs(count: int) -> bytes:
    return b"](" + b"".join(b"K" + bytes([i]) + b"N\x86" for i in range(count)) + b"e"


STORAGE = b"(" + text_op("storage") + b"ctorch\nFloatStorage\n" + text_op("0") + text_op("cpu") + b"K\x04tQ"


def tensor(size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85") -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + size + stride + b"\x89}tR"


def bombs() -> dict[str, bytes]:
    call = b"h\x00h\x01R"
    sixty = b"(" + b"K\x01" * 60 + b"t"
    return {
        "sets of one list": repeated(call, 60_000, put(0, b"cbuiltins\nset\n") + put(1, numbers(64) + b"\x85")),
        "frozen sets of one list": repeated(call, 60_000, put(0, b"cbuiltins\nfrozenset\n") + put(1, numbers(60) + b"\x85")),
        "ordered dicts of one list": repeated(call, 60_000, put(0, b"ccollections\nOrderedDict\n") + put(1, pairs(60) + b"\x85")),
        "counters of one dict": repeated(
            call,
            60_000,
            put(0, b"ccollections\nCounter\n") + put(1, b"}(" + b"".join(b"K" + bytes([i]) + b"N" for i in range(60)) + b"u\x85"),
        ),
        "sizes of one tuple": repeated(call, 60_000, put(0, b"ctorch\nSize\n") + put(1, sixty + b"\x85")),
        "tensors of one size": repeated(
            call,
            60_000,
            put(0, b"ctorch._utils\n_rebuild_tensor_v2\n")
            + put(1, b"(" + STORAGE + b"K\x00" + (b"ctorch\nSize\n" + sixty + b"\x85Rq\x02") + b"h\x02\x89}t"),
        ),
        "long names of subclasses": repeated(
            call,
            20_000,
            put(0, b"ctorch._tensor\n_rebuild_from_type_v2\n")
            + put(1, b"(h\x00" + b"cmegatron." + b"a" * 200 + b"\n" + b"b" * 200 + b"\n" + b")Nt"),
        ),
        "long names by getattr": repeated(
            call, 20_000, put(0, b"cbuiltins\ngetattr\n") + put(1, b"cmegatron.x\n" + b"a" * 200 + b"\n" + text_op("y" * 60) + b"\x86")
        ),
        "one tensor under many names": b"\x80\x02](" + put(0, tensor()) + b"h\x00" * 60_000 + b"e.",
        "one tensor below a long name": b"\x80\x02}" + text_op("k" * 4000) + b"](" + put(0, tensor()) + b"h\x00" * 100_000 + b"es.",
        "one small dict many times": b"\x80\x02](" + put(0, b"}NNs") + b"h\x00" * 50_000 + b"e.",
        "one small set many times": b"\x80\x04](" + put(0, b"\x8f(K\x01K\x02K\x03K\x04K\x05\x90") + b"h\x00" * 60_000 + b"e.",
        "shared at every level": b"\x80\x02]q\x00"
        + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(30))
        + b".",
        "all pairs of names": b"\x80\x02("
        + b"".join(put(i, text_op("megatron." + "a" * 200 + str(i))) for i in range(120))
        + b"".join(b"h" + bytes([i]) + b"h" + bytes([j]) + b"\x93" for i in range(120) for j in range(120))
        + b"t.",
        "memo of one value": b"\x80\x04N" + b"\x94" * 100_000 + b".",
        "marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "copies on the stack": b"\x80\x02(N" + b"2" * 100_000 + b"t.",
        "tuples in tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "tuples of themselves": b"\x80\x02)" + b"2\x86" * 100 + b".",
        "dicts in dicts": b"\x80\x02" + b"}N" * 50_000 + b"s" * 49_999 + b".",
        "lists in lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "sets": b"\x80\x04(" + b"\x8f" * 200_000 + b"t.",
        "rebuilt from rebuilt": repeated(
            b"h\x00" + b"(h\x00h\x01" * 50_000 + b")" + b"Nt" * 50_000 + b"R",
            1,
            put(0, b"ctorch._tensor\n_rebuild_from_type_v2\n") + put(1, b"ctorch\nTensor\n"),
        ),
        "one list in itself": b"\x80\x02]q\x00(" + b"h\x00" * 100_000 + b"e.",
        "one dict in itself": b"\x80\x02}q\x00K\x01h\x00s.",
        "long integers as keys": b"\x80\x02}\x8b" + struct.pack("<I", 200_000) + b"\x7f" * 200_000 + b"Ns.",
        "colliding integers": b"\x80\x02}("
        + b"".join(b"\x8a\x09" + (i * ((1 << 61) - 1)).to_bytes(9, "little", signed=True) + b"N" for i in range(9)) * 2000
        + b"u.",
        "long tuples as keys": b"\x80\x02}(" + (sixty + b"N") * 3000 + b"u.",
        "long4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "negative long4": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "unicode8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b".",
        "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 64) - 1) + b".",
        "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b".",
        "bytes": b"\x80\x03B\xff\xff\xff\xff.",
        "a frame of all there is": b"\x80\x04\x95" + struct.pack("<Q", (1 << 64) - 1) + b"N",
        "a name without an end": b"\x80\x02c" + b"a" * 300_000,
        "one name many times": b"\x80\x02" + b"cmegatron.x\nf\n0" * 30_000 + b"N.",
        "a number of the memo": b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i * 40_009 & 0xFFFFFFFF) for i in range(60_000)) + b".",
    }


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(("name", "pickled"), bombs().items(), ids=bombs())
def test_bombs_cost_little(name: str, pickled: bytes) -> None:
    refusal = attempt(UNPICKLE, pickled, measure=True)
    assert refusal is None or isinstance(refusal, ContainerError | UnsupportedError)


def test_honest_values_are_far_from_the_limits() -> None:
    """What limits bombs must not stop a large optimizer's state, sets and ordered dicts."""
    value = {
        "state": {
            i: {"step": float(i), "ids": set(range(i, i + 40)), "shape": (i, i), "empty": [], "nested": [[{}]] * 3} for i in range(3000)
        },
        "names": [f"layer.{i}.weight" for i in range(5000)],
        "tuples": [(i % 7, None) for i in range(5000)],
        "nothing": [[] for _ in range(5000)],
        "fields": [{i: None} for i in range(5000)],
    }
    for protocol in (2, 3, 4, 5):
        assert attempt(UNPICKLE, pickle.dumps(value, protocol), measure=False) is None
