"""Every variable has one test in this folder that shows its effect, found by the name of the variable."""

import pytest

from env_config.section import Declaration
from env_config.variables import DECLARATIONS
from tests.support.proofs import all_proofs


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda declaration: declaration.variable.lower())
def test_one_test_is_the_proof_of_a_variable_and_says_what_it_ran_on(declaration: Declaration) -> None:
    (proof,) = (proof for proof in all_proofs() if proof.proves(declaration.variable))
    assert proof.ran_on


def test_no_two_variables_share_a_proof() -> None:
    assert len(all_proofs()) == len(DECLARATIONS) == 45
