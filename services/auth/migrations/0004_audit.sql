-- What an administrator asks of a user of another tenant is answered as fast as of one that there is not: nothing of theirs is looked at.
-- The two are looked for as one text, of which the planner knows how common it is; of a user alone it knows that without the tenant, and
-- would look for a busy one of another tenant elsewhere than for nobody.
DROP INDEX auth.audit_of_user;
CREATE INDEX audit_of_user ON auth.audit ((tenant_id::text || user_id::text), position DESC);
