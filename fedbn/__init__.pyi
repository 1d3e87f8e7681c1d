from fedbn.auditing import Audit as Audit
from fedbn.auditing import audit as audit
from fedbn.errors import UserError as UserError
from fedbn.estimator import PersonalizedClassifier as PersonalizedClassifier
from fedbn.federation import Outcome as Outcome
from fedbn.federation import federate as federate
from fedbn.layers import convert as convert
from fedbn.moments import Moments as Moments
from fedbn.online import Personalized as Personalized
from fedbn.online import Rule as Rule
from fedbn.online import personalize as personalize
from fedbn.online import rule as rule
from fedbn.roles import Role as Role
from fedbn.run import Plan as Plan
from fedbn.run import Run as Run
from fedbn.strategy import NormStrategy as NormStrategy
from fedbn.strategy import Owner as Owner
from simulations.api import compare as compare
from simulations.api import load as load
from simulations.api import study as study

__all__: list[str]
