//! A stranger's template, made ready to run: not too long, and with the limits of [`values`](super::values) put around
//! everything that can give a list or dict.

use minijinja::machinery::ast::{
    AutoEscape, BinOp, BinOpKind, Call, CallArg, CallBlock, Compare, CompareOp, Const, Do, EmitExpr, EmitRaw, Expr,
    Filter, FilterBlock, ForLoop, GetAttr, GetItem, IfCond, IfExpr, List, Macro, Map, Set, SetBlock, Slice, Spanned,
    Stmt, Template, Test, Tuple, UnaryOp, UnaryOpKind, Var, WithBlock,
};
use minijinja::machinery::{Span, Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;

/// Longest template in bytes. The longest of published chat models have 30 thousand.
const MAX_TEMPLATE: usize = 1 << 16;
/// Most words and signs between `{{` and `}}`, or `{%` and `%}`: parsing and compiling recurse.
const MAX_TOKENS: usize = 512;
/// Most `elif` in a template, which are nested in one another.
const MAX_ELIFS: usize = 64;

/// The functions [`bounded`](super::values::bounded) and [`kept`](super::values::kept), by names that a template cannot write.
pub(super) const BOUNDED: &str = "(bounded)";
pub(super) const KEPT: &str = "(kept)";

/// The source that is parsed, or the reason why it is not run: with the line ends of Jinja2, and without the tags by which TRL
/// finds the words of the model, which add nothing to the prompt.
pub(super) fn prepare(source: &str, syntax: &SyntaxConfig) -> Result<String, String> {
    if source.len() > MAX_TEMPLATE {
        return Err(format!("it has {} bytes, and at most {MAX_TEMPLATE} are read", source.len()));
    }
    let source = source.strip_prefix('\u{feff}').unwrap_or(source).replace("\r\n", "\n").replace('\r', "\n");
    let tags = check_length(&source, syntax)?;
    let mut prepared = String::new();
    let mut copied = 0;
    for (span, replacement) in tags {
        let (start, end) = (span.start_offset as usize, span.end_offset as usize);
        prepared.push_str(source.get(copied..start).unwrap_or_default());
        prepared.push_str(replacement);
        copied = end;
    }
    prepared.push_str(source.get(copied..).unwrap_or_default());
    // the error is found now, not when a chat is rendered
    template(&prepared, syntax)?;
    Ok(prepared)
}

/// The words `generation` and `endgeneration` that are tags, with what does nothing in their place.
fn check_length(source: &str, syntax: &SyntaxConfig) -> Result<Vec<(Span, &'static str)>, String> {
    let (mut tokens, mut elifs) = (0, 0);
    let mut tags = Vec::new();
    let mut last = None;
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token.map_err(|error| error.to_string())?;
        match token {
            Token::TemplateData(_) | Token::VariableStart | Token::BlockStart => tokens = 0,
            Token::Ident("elif") => elifs += 1,
            Token::Ident("generation") if matches!(last, Some(Token::BlockStart)) => tags.push((span, "if true")),
            Token::Ident("endgeneration") if matches!(last, Some(Token::BlockStart)) => tags.push((span, "endif")),
            _ => {}
        }
        last = Some(token);
        tokens += 1;
        if tokens > MAX_TOKENS {
            return Err(format!("line {}: more than {MAX_TOKENS} words and signs in one tag", span.start_line));
        }
        if elifs > MAX_ELIFS {
            return Err(format!("line {}: more than {MAX_ELIFS} elif", span.start_line));
        }
    }
    Ok(tags)
}

/// A template from [`prepare`], parsed and bounded.
pub(super) fn template<'a>(source: &'a str, syntax: &SyntaxConfig) -> Result<Stmt<'a>, String> {
    let parsed = parse(source, "chat template", syntax.clone()).map_err(|error| error.to_string())?;
    Ok(statement(&parsed))
}

// What follows copies the tree: its nodes cannot be changed in place.

fn statements<'a>(statements: &[Stmt<'a>]) -> Vec<Stmt<'a>> {
    statements.iter().map(statement).collect()
}

fn statement<'a>(node: &Stmt<'a>) -> Stmt<'a> {
    match node {
        Stmt::Template(n) => Stmt::Template(Spanned::new(Template { children: statements(&n.children) }, n.span())),
        Stmt::EmitExpr(n) => {
            // mostly a text, which is written out and gone
            let text = matches!(n.expr, Expr::Filter(_) | Expr::Call(_));
            let expr = if text { parts(&n.expr) } else { expression(&n.expr) };
            Stmt::EmitExpr(Spanned::new(EmitExpr { expr }, n.span()))
        }
        Stmt::EmitRaw(n) => Stmt::EmitRaw(Spanned::new(EmitRaw { raw: n.raw }, n.span())),
        Stmt::ForLoop(n) => {
            let new = ForLoop {
                target: parts(&n.target),
                iter: assigned(&n.target, &n.iter),
                filter_expr: optional(&n.filter_expr),
                recursive: n.recursive,
                body: statements(&n.body),
                else_body: statements(&n.else_body),
            };
            Stmt::ForLoop(Spanned::new(new, n.span()))
        }
        Stmt::IfCond(n) => {
            let new = IfCond {
                expr: expression(&n.expr),
                true_body: statements(&n.true_body),
                false_body: statements(&n.false_body),
            };
            Stmt::IfCond(Spanned::new(new, n.span()))
        }
        Stmt::WithBlock(n) => {
            let assignments = n.assignments.iter().map(|(target, expr)| (parts(target), assigned(target, expr)));
            let new = WithBlock { assignments: assignments.collect(), body: statements(&n.body) };
            Stmt::WithBlock(Spanned::new(new, n.span()))
        }
        Stmt::Set(n) => {
            let new = Set { target: parts(&n.target), expr: assigned(&n.target, &n.expr) };
            Stmt::Set(Spanned::new(new, n.span()))
        }
        Stmt::SetBlock(n) => {
            let filter = n.filter.as_ref().map(|filter| assigned(&n.target, filter));
            let new = SetBlock { target: parts(&n.target), filter, body: statements(&n.body) };
            Stmt::SetBlock(Spanned::new(new, n.span()))
        }
        Stmt::AutoEscape(n) => {
            let new = AutoEscape { enabled: expression(&n.enabled), body: statements(&n.body) };
            Stmt::AutoEscape(Spanned::new(new, n.span()))
        }
        Stmt::FilterBlock(n) => {
            let new = FilterBlock { filter: parts(&n.filter), filter_span: n.filter_span, body: statements(&n.body) };
            Stmt::FilterBlock(Spanned::new(new, n.span()))
        }
        Stmt::Macro(n) => Stmt::Macro(declaration(n)),
        Stmt::CallBlock(n) => {
            let call = Spanned::new(called(&n.call), n.call.span());
            let new = CallBlock { call, call_expr_span: n.call_expr_span, macro_decl: declaration(&n.macro_decl) };
            Stmt::CallBlock(Spanned::new(new, n.span()))
        }
        Stmt::Continue(n) => Stmt::Continue(Spanned::new(minijinja::machinery::ast::Continue, n.span())),
        Stmt::Break(n) => Stmt::Break(Spanned::new(minijinja::machinery::ast::Break, n.span())),
        Stmt::Do(n) => Stmt::Do(Spanned::new(Do { call: Spanned::new(called(&n.call), n.call.span()) }, n.span())),
    }
}

fn declaration<'a>(n: &Spanned<Macro<'a>>) -> Spanned<Macro<'a>> {
    let new = Macro {
        name: n.name,
        args: n.args.iter().map(parts).collect(),
        defaults: n.defaults.iter().map(expression).collect(),
        body: statements(&n.body),
    };
    Spanned::new(new, n.span())
}

fn optional<'a>(node: &Option<Expr<'a>>) -> Option<Expr<'a>> {
    node.as_ref().map(expression)
}

/// What is assigned to a target: a namespace outlives the block.
fn assigned<'a>(target: &Expr<'a>, value: &Expr<'a>) -> Expr<'a> {
    if has_attribute(target) { passed(KEPT, parts(value)) } else { expression(value) }
}

fn has_attribute(target: &Expr) -> bool {
    match target {
        Expr::Var(_) => false,
        Expr::List(n) => n.items.iter().any(has_attribute),
        Expr::Tuple(n) => n.items.iter().any(has_attribute),
        _ => true,
    }
}

/// A call, not a filter: those pay once more for the text that they are given.
fn passed<'a>(function: &'a str, argument: Expr<'a>) -> Expr<'a> {
    let span = argument.span();
    let expr = Expr::Var(Spanned::new(Var { id: function }, span));
    Expr::Call(Spanned::new(Call { expr, args: vec![CallArg::Pos(argument)] }, span))
}

/// The expression, bounded where it can make a list or dict.
fn expression<'a>(node: &Expr<'a>) -> Expr<'a> {
    let makes = match node {
        Expr::BinOp(n) => matches!(n.op, BinOpKind::Add | BinOpKind::Mul) && !is_text(node),
        Expr::Slice(_) | Expr::Filter(_) | Expr::Call(_) => true,
        Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) => node.as_const().is_none(),
        _ => false,
    };
    if makes { passed(BOUNDED, parts(node)) } else { parts(node) }
}

/// Whether it gives a text or an error.
fn is_text(node: &Expr) -> bool {
    match node {
        Expr::Const(n) => n.value.as_str().is_some(),
        Expr::BinOp(n) => match n.op {
            BinOpKind::Concat => true,
            BinOpKind::Add => is_text(&n.left) || is_text(&n.right),
            _ => false,
        },
        _ => false,
    }
}

/// The expression as it is, with its parts bounded.
fn parts<'a>(node: &Expr<'a>) -> Expr<'a> {
    match node {
        Expr::Var(n) => Expr::Var(Spanned::new(Var { id: n.id }, n.span())),
        Expr::Const(n) => Expr::Const(Spanned::new(Const { value: n.value.clone() }, n.span())),
        Expr::Slice(n) => {
            let (start, stop, step) = (optional(&n.start), optional(&n.stop), optional(&n.step));
            Expr::Slice(Spanned::new(Slice { expr: expression(&n.expr), start, stop, step }, n.span()))
        }
        Expr::UnaryOp(n) => {
            let op = if matches!(n.op, UnaryOpKind::Not) { UnaryOpKind::Not } else { UnaryOpKind::Neg };
            Expr::UnaryOp(Spanned::new(UnaryOp { op, expr: expression(&n.expr) }, n.span()))
        }
        Expr::BinOp(n) => {
            let new = BinOp { op: n.op, left: expression(&n.left), right: expression(&n.right) };
            Expr::BinOp(Spanned::new(new, n.span()))
        }
        Expr::Compare(n) => {
            let ops = n.ops.iter().map(|op| CompareOp { op: op.op, expr: expression(&op.expr) }).collect();
            Expr::Compare(Spanned::new(Compare { expr: expression(&n.expr), ops }, n.span()))
        }
        Expr::IfExpr(n) => {
            let new = IfExpr {
                test_expr: expression(&n.test_expr),
                true_expr: expression(&n.true_expr),
                false_expr: optional(&n.false_expr),
            };
            Expr::IfExpr(Spanned::new(new, n.span()))
        }
        Expr::Filter(n) => {
            let new = Filter { name: n.name, expr: optional(&n.expr), args: arguments(&n.args) };
            Expr::Filter(Spanned::new(new, n.span()))
        }
        Expr::Test(n) => {
            let new = Test { name: n.name, expr: expression(&n.expr), args: arguments(&n.args) };
            Expr::Test(Spanned::new(new, n.span()))
        }
        Expr::GetAttr(n) => Expr::GetAttr(Spanned::new(GetAttr { expr: expression(&n.expr), name: n.name }, n.span())),
        Expr::GetItem(n) => {
            let new = GetItem { expr: expression(&n.expr), subscript_expr: expression(&n.subscript_expr) };
            Expr::GetItem(Spanned::new(new, n.span()))
        }
        Expr::Call(n) => Expr::Call(Spanned::new(called(n), n.span())),
        Expr::List(n) => Expr::List(Spanned::new(List { items: items(&n.items) }, n.span())),
        Expr::Tuple(n) => Expr::Tuple(Spanned::new(Tuple { items: items(&n.items) }, n.span())),
        Expr::Map(n) => Expr::Map(Spanned::new(Map { keys: items(&n.keys), values: items(&n.values) }, n.span())),
    }
}

fn items<'a>(items: &[Expr<'a>]) -> Vec<Expr<'a>> {
    items.iter().map(expression).collect()
}

fn called<'a>(call: &Call<'a>) -> Call<'a> {
    Call { expr: parts(&call.expr), args: arguments(&call.args) }
}

fn arguments<'a>(arguments: &[CallArg<'a>]) -> Vec<CallArg<'a>> {
    let argument = |argument: &CallArg<'a>| match argument {
        CallArg::Pos(expr) => CallArg::Pos(expression(expr)),
        CallArg::Kwarg(name, expr) => CallArg::Kwarg(name, expression(expr)),
        CallArg::PosSplat(expr) => CallArg::PosSplat(expression(expr)),
        CallArg::KwargSplat(expr) => CallArg::KwargSplat(expression(expr)),
    };
    arguments.iter().map(argument).collect()
}
