import pytest

from mail_agents import errors


def test_every_error_is_of_the_family_and_of_a_builtin_kind():
    assert issubclass(errors.UnknownNameError, KeyError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert issubclass(errors.StorageError, OSError)
    for kind in (errors.InvalidInputError, errors.FeatureMismatchError, errors.CorruptFileError):
        assert issubclass(kind, ValueError)
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert issubclass(kind, errors.MailAgentsError)
            # KeyError alone would show the repr, with its line breaks escaped.
            assert str(kind("first\nsecond")) == "first\nsecond"


def test_suggest_takes_the_closest_or_nothing():
    assert errors.suggest("reech-v3", ["push-v3", "reach-v3"]) == " Did you mean 'reach-v3'?"
    assert errors.suggest("zzz", ["push-v3"]) == ""


def test_unknown_name_lists_at_most_twelve():
    message = str(errors.unknown_name("task", "a", [f"t{i:02d}" for i in range(13)], "Run x."))
    assert message.startswith("Unknown task 'a'. Valid: t00,")
    assert "t12" not in message
    assert message.endswith("... (13 in all). Run x.")
    assert "Valid: none." in str(errors.unknown_name("task", "a", []))


def test_require_imports_or_names_the_extra(tmp_path, monkeypatch):
    assert errors.require("json", "sim").loads("1") == 1
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_binary.py").write_text("raise OSError('libcuda.so: no such file')")
    with pytest.raises(errors.MissingDependencyError) as caught:
        errors.require("broken_binary", "cuda", purpose="the fast kernel")
    message = str(caught.value)
    for part in ("'broken_binary'", "the fast kernel", "libcuda.so", "mail-agents[cuda]", "doctor"):
        assert part in message
    assert isinstance(caught.value.__cause__, OSError)
